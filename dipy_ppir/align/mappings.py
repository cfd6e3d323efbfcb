"""Diffeomorphic maps as files that DIPY reads and writes.

A file holds the displacements of both directions, shape (X, Y, Z, 3, 2), and its affine
is, as DIPY has it, the inverse of the grid's. The grid is that of the static image;
it is larger where a prealign matrix was made part of the displacements.
"""

from pathlib import Path

from dipy.align.imwarp import DiffeomorphicMap
from dipy.io.image import save_nifti
import nibabel as nib
from nibabel.affines import apply_affine
import numpy as np
from scipy.ndimage import map_coordinates

from dipy_ppir.align.remote import is_remote


def displacements(mapping):
    """Displacements in both directions, the prealign matrix included.

    ``dipy_apply_transform`` knows of no prealign matrix, and so would leave it out.

    Parameters
    ----------
    mapping : DiffeomorphicMap
        as `SecureSymmetricDiffeomorphicRegistration` returns it.

    Returns
    -------
    field : array of float32, shape (S, R, C, 3, 2)
        displacements from moving to static world coordinates, mm, and back. With a
        prealign matrix the grid is extended to hold the moving image as well.
    grid2world : array, shape (4, 4)
        voxel-to-space transformation of the field.
    """
    to_moving = np.asarray(mapping.get_forward_field(), dtype=np.float64)
    to_static = np.asarray(mapping.get_backward_field(), dtype=np.float64)
    grid2world = mapping.disp_grid2world
    matrix = mapping.prealign_inv if mapping.is_inverse else mapping.prealign
    if matrix is not None and not np.array_equal(matrix, np.eye(mapping.dim + 1)):
        dim, inverse = mapping.dim, np.linalg.inv(matrix)
        before, after = _room(mapping)
        padding = [*zip(before, after, strict=True), (0, 0)]
        to_moving, to_static = (np.pad(f, padding) for f in (to_moving, to_static))
        shift = np.eye(dim + 1)
        shift[:dim, dim] = -np.array(before)
        grid2world = grid2world @ shift
        points = points_of(to_moving.shape[:-1], grid2world)
        to_moving = apply_affine(matrix, points + to_moving) - points
        # The field is wanted at points of the moving space, and known at static ones.
        back = apply_affine(inverse, points)
        to_static = back + sample_field(to_static, back, grid2world) - points
    field = np.stack([to_static, to_moving], axis=-1)
    return field.astype(np.float32), grid2world


def _room(mapping):
    """Voxels to add before and after each axis so that the moving image fits in.

    None, if the grid would become more than eight times as large: then the way back
    holds where the grids overlap.
    """
    shape, dim = np.array(mapping.disp_shape), mapping.dim
    moving_shape, moving_grid2world = grids_of(mapping)["moving"]
    ends = np.array(moving_shape) - 1
    corners = np.array(np.meshgrid(*[(0, n) for n in ends])).reshape(dim, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    to_field = np.linalg.inv(mapping.disp_grid2world) @ moving_grid2world
    corners = (to_field @ corners)[:dim]
    before = np.maximum(np.ceil(-corners.min(axis=1)), 0).astype(int)
    after = np.maximum(np.ceil(corners.max(axis=1)) - shape + 1, 0).astype(int)
    if np.prod(shape + before + after) > 8 * np.prod(shape):
        return np.zeros(dim, int), np.zeros(dim, int)
    return before, after


def grids_of(mapping):
    """Shape and grid2world of the "static" and the "moving" image of a map."""
    domain = mapping.domain_shape, mapping.domain_grid2world
    codomain = mapping.codomain_shape, mapping.codomain_grid2world
    static, moving = (codomain, domain) if mapping.is_inverse else (domain, codomain)
    return {"static": static, "moving": moving}


def sample_field(field, points, grid2world):
    """Displacements at points of the world, linearly; none outside of the grid.

    As in ITK the grid ends half a voxel beyond the centres of its outermost voxels.

    Parameters
    ----------
    field : array, shape (S, R, C, 3) or (R, C, 2)
    points : array, shape (..., dim)
        mm.
    grid2world : array, shape (dim + 1, dim + 1)
        voxel-to-space transformation of the field.

    Returns
    -------
    displacements : array, shape (..., dim)
    """
    dim = field.shape[-1]
    voxels = apply_affine(np.linalg.inv(grid2world), points)
    ends = np.array(field.shape[:-1]) - 0.5
    inside = ((voxels > -0.5) & (voxels < ends)).all(axis=-1)
    voxels = np.moveaxis(voxels, -1, 0)
    return np.stack(
        [
            inside * map_coordinates(field[..., i], voxels, order=1, mode="nearest")
            for i in range(dim)
        ],
        axis=-1,
    )


def points_of(shape, grid2world):
    """World coordinates of a grid's voxels, mm; the last axis is theirs."""
    voxels = np.moveaxis(np.indices(shape, dtype=np.float64), 0, -1)
    return apply_affine(grid2world, voxels)


def grid_of(image):
    """Shape and voxel-to-space transformation of an image, not its voxels.

    Parameters
    ----------
    image : str, Path, nibabel image or RemoteImage
        of a series the grid of a volume.

    Returns
    -------
    shape : tuple of int
    grid2world : array, shape (dim + 1, dim + 1)
    """
    if is_remote(image):
        return image.shape, image.grid2world
    if isinstance(image, (str, Path)):
        image = nib.load(image)
    if not isinstance(image, nib.spatialimages.SpatialImage):
        raise ValueError(
            "of an image only the grid is needed: give a file, a nibabel image or a "
            f"RemoteImage, not a {type(image).__name__}"
        )
    return image.shape[:3], np.asarray(image.affine, dtype=np.float64)


def write_mapping(mapping, fname):
    """Write a map to a NIfTI file, as `dipy.align.write_mapping` does.

    A prealign matrix is made part of the displacements, so that the file is all that
    is needed to apply the map; DIPY leaves it out. `read_mapping` reads it, and so
    does DIPY's, both with ``prealign=None``.

    Parameters
    ----------
    mapping : DiffeomorphicMap
        of three dimensions, as `syn_registration` returns it.
    fname : str or Path

    Raises
    ------
    ValueError
        if this is no map, or one of two dimensions, for which there is no such file,
        or if the folder is missing.
    """
    check_map(mapping)
    check_folder(fname)
    if mapping.dim != 3:
        raise ValueError(
            f"a map of {mapping.dim} dimensions does not fit into DIPY's files, which "
            "are of three; use write_transform with a name that ends in .h5"
        )
    field, grid2world = displacements(mapping)
    save_nifti(fname, field, np.linalg.inv(grid2world))


def check_map(mapping):
    """Refuse what is no map, with a `ValueError`."""
    if isinstance(mapping, DiffeomorphicMap):
        return
    hint = ""
    if isinstance(mapping, np.ndarray):
        hint = "; write a matrix with write_transform or numpy.savetxt"
    elif isinstance(mapping, (str, Path)):
        hint = "; read the file first, with read_transform or read_mapping"
    raise ValueError(
        "a map is needed, a DiffeomorphicMap as syn_registration returns it, not a "
        f"{type(mapping).__name__}{hint}"
    )


def check_folder(path):
    """Refuse a file to write whose folder is missing, with a `ValueError`."""
    if not Path(path).parent.is_dir():
        raise ValueError(
            f"the folder of {path} does not exist; make it first, or choose another"
        )


def read_mapping(disp, domain_img, codomain_img, *, prealign=None):
    """Read a map that `write_mapping`, a command or DIPY wrote.

    As `dipy.align.read_mapping`, for images whose grids differ, too. DIPY's own reads
    the same files, and right ones from files (not images) if the codomain image has
    three dimensions; its command ``dipy_apply_transform`` interchanges the two grids.

    Parameters
    ----------
    disp : str, Path or nibabel image
        displacements from moving to static world coordinates and back, mm, shape
        (X, Y, Z, 3, 2).
    domain_img : str, Path, nibabel image or RemoteImage
        the moving image, of which only the grid is used.
    codomain_img : str, Path, nibabel image or RemoteImage
        the static image, likewise.
    prealign : array, shape (4, 4), optional
        from moving to static world coordinates, for maps that were written without:
        the inverse of what the registration began with. DIPY's `write_mapping`
        leaves it out, `write_mapping` here does not.

    Returns
    -------
    mapping : DiffeomorphicMap
        ``transform`` brings the moving image onto the static image's grid.

    Raises
    ------
    ValueError
        if the file holds anything else.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from dipy.align.imwarp import DiffeomorphicMap
    >>> import numpy as np
    >>> from dipy_ppir.align import RemoteImage, read_mapping, write_mapping
    >>> static, moving = RemoteImage((8, 9, 10)), RemoteImage((7, 7, 7))
    >>> mapping = DiffeomorphicMap(
    ...     3, static.shape, domain_shape=moving.shape, codomain_shape=static.shape
    ... )
    >>> mapping.is_inverse = True
    >>> mapping.allocate()
    >>> with TemporaryDirectory() as folder:
    ...     write_mapping(mapping, folder + "/map.nii.gz")
    ...     read = read_mapping(folder + "/map.nii.gz", moving, static)
    >>> np.asarray(read.transform(np.ones(moving.shape, np.float32))).shape
    (8, 9, 10)
    """
    what = "the displacement field"
    if isinstance(disp, (str, Path)):
        what, disp = f"{what} {disp}", nib.load(disp)
    return mapping_from(
        np.asarray(disp.dataobj),
        np.asarray(disp.affine, dtype=np.float64),
        moving=grid_of(domain_img),
        static=grid_of(codomain_img),
        prealign=prealign,
        what=what,
    )


def mapping_from(
    data, affine, *, static, moving, prealign=None, what="the displacement field"
):
    """The map that a file of DIPY's holds.

    Parameters
    ----------
    data : array, shape (X, Y, Z, 3, 2)
        see `read_mapping`.
    affine : array, shape (4, 4)
        of the file: the inverse of the grid's.
    static, moving : tuple
        shape and grid2world of the images.
    prealign : array, shape (4, 4), optional
    what : str, optional
        names the data in messages.

    Returns
    -------
    mapping : DiffeomorphicMap

    Raises
    ------
    ValueError
        if these are no map.
    """
    if data.ndim != 5 or data.shape[3:] != (3, 2):
        of_fsl = data.ndim == 4 and data.shape[3] == 3
        raise ValueError(
            f"{what} has shape {data.shape}, but a map has (X, Y, Z, 3, 2); give the "
            "file that dipy_ppir_align_syn wrote"
            + ", or convert FSL's with dipy_ppir_convert_transform"
            * of_fsl
        )
    if data.dtype.kind not in "iuf":
        raise ValueError(f"{what} must hold real numbers, not {data.dtype}")
    if abs(np.linalg.det(affine)) < 1e-12:
        raise ValueError(
            f"the affine of {what} is singular; give the file that "
            "dipy_ppir_align_syn wrote"
        )
    if not np.isfinite(data).all():
        raise ValueError(f"{what} contains NaN or infinity; register again")
    return both_ways(
        data[..., 0],
        data[..., 1],
        np.linalg.inv(affine),
        static=static,
        moving=moving,
        prealign=prealign,
    )


def both_ways(to_static, to_moving, grid2world, *, static, moving, prealign):
    """The map of displacements from moving to static space and back.

    Parameters
    ----------
    to_static, to_moving : array, shape (S, R, C, 3) or (R, C, 2)
    grid2world : array, shape (dim + 1, dim + 1)
        of both.
    static, moving : tuple
        shape and grid2world of the images.
    prealign : array or None
        from moving to static world coordinates, before.

    Returns
    -------
    mapping : DiffeomorphicMap
    """
    mapping = DiffeomorphicMap(
        to_static.ndim - 1,
        to_static.shape[:-1],
        disp_grid2world=grid2world,
        domain_shape=moving[0],
        domain_grid2world=moving[1],
        codomain_shape=static[0],
        codomain_grid2world=static[1],
        prealign=prealign,
    )
    mapping.forward = np.ascontiguousarray(to_static, dtype=np.float32)
    mapping.backward = np.ascontiguousarray(to_moving, dtype=np.float32)
    mapping.is_inverse = True
    return mapping
