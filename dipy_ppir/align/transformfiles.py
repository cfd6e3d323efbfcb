"""Transforms in the files of other programs.

A transform takes points of the static image to points of the moving one, world
coordinates, RAS, mm: a matrix, as in ``affine.txt``, or a `DiffeomorphicMap`.

======  ===============================  ==========================================
format  matrix                           map
======  ===============================  ==========================================
dipy    text                             NIfTI, shape (X, Y, Z, 3, 2)
itk     .txt, .tfm, .mat, .h5            .h5; NIfTI, shape (X, Y, Z, 1, 3)
x5      .x5                              .x5
fsl     text (.mat), as of ``flirt``     NIfTI, shape (X, Y, Z, 3), as of ``fnirt``
lta     .lta, as of FreeSurfer           none
======  ===============================  ==========================================

Those of ITK are in `itkfiles`, X5, FLIRT's and FreeSurfer's matrices are read and
written by nitransforms. It (25.1) interchanges the two images' grids in an LTA, which
is put right here, and takes FNIRT's displacements for differences of world
coordinates, which they are only where both images have the same grid along the axes
of the world; they are computed here.

But for DIPY's, files hold one direction of a map; the other is found by DIPY's
fixed-point iteration.
"""

from pathlib import Path
import warnings

from dipy.align.vector_fields import (
    invert_vector_field_fixed_point_2d,
    invert_vector_field_fixed_point_3d,
)
import nibabel as nib
from nibabel.affines import apply_affine, from_matvec, voxel_sizes
import numpy as np

from dipy_ppir.align import itkfiles
from dipy_ppir.align.containers import BROKEN, check_hdf5
from dipy_ppir.align.itkfiles import Displacements
from dipy_ppir.align.mappings import (
    both_ways,
    check_folder,
    check_map,
    displacements,
    grid_of,
    grids_of,
    mapping_from,
    points_of,
    sample_field,
    write_mapping,
)

FORMATS = ("dipy", "itk", "x5", "fsl", "lta")
#: Endings that say the format of a file that is to be written.
_ENDINGS = {".tfm": "itk", ".h5": "itk", ".x5": "x5", ".lta": "lta"}
_NIFTI = (".nii", ".nii.gz")
#: Iterations and tolerance (voxels) of the inversion of fields, and how far the way
#: there and back may lead apart in 95 % of the voxels before a warning says so.
_ITERATIONS, _TOLERANCE, _APART = 60, 1e-3, 0.5
#: Points of the grid to which the affine part of a displacement field is fitted.
_FITTED = 50_000


def write_transform(
    path, transform, *, static=None, moving=None, inverse=False, fmt=None
):
    """Write a transform for another program.

    Parameters
    ----------
    path : str or Path
    transform : array, shape (dim + 1, dim + 1), or DiffeomorphicMap
        from static to moving space, as a registration returns it.
    static, moving : str, Path, nibabel image or RemoteImage, optional
        the images, of which only the grids are used: with a matrix in the formats
        "fsl", "lta" and "x5". A map knows them.
    inverse : bool, optional
        write the transform that brings the static image onto the moving one's grid.
    fmt : str, optional
        one of `FORMATS`. By default the name's ending says it: ``.tfm`` or ``.h5``
        (ITK), ``.x5``, ``.lta``.

    Raises
    ------
    ValueError
        if this is no transform, or a matrix that cannot be inverted; if the format
        cannot hold it, or is not clear from the name; if the folder is missing.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> import numpy as np
    >>> from dipy_ppir.align import read_transform, write_transform
    >>> matrix = np.array([[1, 0, 0, 3], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    >>> with TemporaryDirectory() as folder:
    ...     write_transform(folder + "/moving_to_static.tfm", matrix)
    ...     print(open(folder + "/moving_to_static.tfm").read().splitlines()[3])
    ...     same = read_transform(folder + "/moving_to_static.tfm")
    Parameters: 1 0 0 0 1 0 0 0 1 -3 0 0
    >>> np.array_equal(same, matrix)
    True
    """
    path, fmt = Path(path), format_to_write(path, fmt)
    check_folder(path)
    if isinstance(transform, np.ndarray):
        _check_matrix(transform)
        matrix = np.linalg.inv(transform) if inverse else transform
        grids = {}
        if fmt in ("fsl", "lta", "x5"):
            grids = {"static": static, "moving": moving}
            grids = {n: _needed(grids[n], n, fmt) for n in grids}
        _write_matrix(path, matrix, fmt, *_turned(grids, inverse))
        return
    check_map(transform)
    grids = grids_of(transform)
    if fmt == "dipy" and not inverse:
        write_mapping(transform, path)
        return
    field, grid2world = displacements(transform)
    if fmt == "dipy":
        image = nib.Nifti1Image(field[..., ::-1], np.linalg.inv(grid2world))
        nib.save(image, path)
        return
    field = np.ascontiguousarray(field[..., 0 if inverse else 1])
    _write_field(path, Displacements(field, grid2world), fmt, *_turned(grids, inverse))


def read_transform(path, *, static=None, moving=None, fmt=None):
    """Read a transform that another program wrote.

    Parameters
    ----------
    path : str or Path
    static, moving : str, Path, nibabel image or RemoteImage, optional
        the images, of which only the grids are used: needed for all maps, and for
        matrices of FSL's.
    fmt : str, optional
        one of `FORMATS`. By default the file says it.

    Returns
    -------
    transform : array, shape (dim + 1, dim + 1), or DiffeomorphicMap
        from static to moving space.

    Raises
    ------
    ValueError
        if the file cannot be read as a transform.
    """
    path, fmt = Path(path), format_to_read(path, fmt)
    images = {"static": static, "moving": moving}
    if fmt == "dipy":
        if not path.name.endswith(_NIFTI):
            return _read_text(path)
        grids = {n: _needed(image, n, "a map") for n, image in images.items()}
        image = nib.load(path)
        what = f"the displacement field {path}"
        return mapping_from(np.asarray(image.dataobj), image.affine, what=what, **grids)
    if fmt == "itk":
        steps = itkfiles.read_itk(path)
    elif fmt == "x5":
        steps = [_read_x5(path)]
    elif fmt == "lta":
        steps = [_read_lta(path)]
    else:
        grids = [_needed(image, n, "fsl") for n, image in images.items()]
        steps = [_read_fsl(path, *grids)]
    if not any(isinstance(step, Displacements) for step in steps):
        matrix = np.eye(len(steps[0]))
        for step in steps:
            matrix = step @ matrix
        return _exact(matrix)
    grids = {n: _needed(image, n, "a map") for n, image in images.items()}
    return _map_of(steps, **grids)


def format_to_write(path, fmt=None):
    """The format of a file to write, see `write_transform`."""
    _check_format(fmt)
    fmt = fmt or _ENDINGS.get(Path(path).suffix)
    if fmt is None:
        raise ValueError(
            f"the name {path} does not say which format is meant; say it: "
            f"{', '.join(FORMATS)}"
        )
    return fmt


def format_to_read(path, fmt=None):
    """The format of a file that is there, see `read_transform`."""
    _check_format(fmt)
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"the transform {path} is a folder; give the name of a file")
    if not path.is_file():
        raise ValueError(
            f"the transform {path} does not exist; check the name of the file"
        )
    if fmt or path.suffix in _ENDINGS:
        return fmt or _ENDINGS[path.suffix]
    if path.name.endswith(_NIFTI):
        shape = _load(path).shape
        for fmt, fits in (
            ("dipy", len(shape) == 5 and shape[3:] == (3, 2)),
            ("itk", len(shape) == 5 and shape[3] == 1),
            ("fsl", len(shape) == 4 and shape[3] == 3),
        ):
            if fits:
                return fmt
        raise ValueError(
            f"{path} has shape {shape}; a map has (X, Y, Z, 3, 2) in DIPY's files, "
            "(X, Y, Z, 1, 3) in ITK's and (X, Y, Z, 3) in FSL's"
        )
    if itkfiles.is_itk_text(path):
        return "itk"
    if path.suffix == ".mat":
        return "fsl" if _is_text(path) else "itk"
    return "dipy"


def _check_format(fmt):
    if fmt is not None and fmt not in FORMATS:
        raise ValueError(
            f"{fmt} is no format of transforms; choose one of {', '.join(FORMATS)}"
        )


def _is_text(path):
    with open(path, "rb") as stream:
        start = stream.read(512)
    return start.isascii() and b"\0" not in start


def _load(path):
    try:
        return nib.load(path)
    except nib.filebasedimages.ImageFileError:
        raise ValueError(f"{path} cannot be read as NIfTI; write it again") from None


def _needed(image, name, why):
    if image is None:
        raise ValueError(
            f"the grid of the {name} image is needed ({why}); give the image as {name}"
        )
    return grid_of(image)


def _turned(grids, inverse):
    """The grid on which the other image comes to lie, and that of the other."""
    both = [grids.get(name) for name in ("static", "moving")]
    return both[::-1] if inverse else both


# -- matrices ---------------------------------------------------------------


def _write_matrix(path, matrix, fmt, static, moving):
    if fmt not in ("dipy", "itk") and len(matrix) != 4:
        raise ValueError(f"{fmt} has matrices of three dimensions only; use itk")
    if fmt == "dipy":
        np.savetxt(path, matrix)
    elif fmt == "itk":
        itkfiles.write_itk(path, matrix)
    elif fmt == "x5":
        _write_x5(path, matrix, static, type="linear", subtype="affine")
    elif fmt == "fsl":
        from nitransforms.io.fsl import FSLLinearTransform as Flirt

        record = Flirt.from_ras(matrix, reference=_image(static), moving=_image(moving))
        path.write_text(record.to_string())
    else:
        from nitransforms.io.lta import FSLinearTransform as LTA

        # Its source is the image that is moved, as in FreeSurfer's programs.
        path.write_text(
            LTA.from_ras(
                matrix, reference=_image(moving), moving=_image(static)
            ).to_string()
        )


def _check_matrix(matrix):
    """Refuse an array that is no matrix to write."""
    fits = matrix.shape in ((3, 3), (4, 4)) and matrix.dtype.kind in "iuf"
    if not fits or not np.isfinite(matrix).all():
        raise ValueError(
            "the transform to write is not a matrix of 4 x 4 finite numbers (3 x 3 for "
            "images of two dimensions); give what a registration returned"
        )
    if not _is_affine(matrix):
        raise ValueError(
            "the matrix to write is no affine transform: it cannot be inverted, or its "
            f"last row is not {_last_row(matrix)}; give what a registration returned"
        )


def _is_affine(matrix):
    last = np.abs(matrix[-1] - np.eye(len(matrix))[-1]).max()
    return abs(np.linalg.det(matrix)) >= 1e-12 and last <= 1e-6


def _last_row(matrix):
    return " ".join(f"{x:g}" for x in np.eye(len(matrix))[-1])


def _read_text(path):
    try:
        matrix = np.loadtxt(path)
    except ValueError:
        matrix = np.zeros(0)
    return _checked(path, matrix)


def _read_lta(path):
    from nitransforms.io.lta import FSLinearTransform as LTA

    try:
        matrix = LTA.from_string(path.read_text()).to_ras()
    except (ValueError, AssertionError, IndexError, np.linalg.LinAlgError):
        raise ValueError(
            f"{path} cannot be read as an LTA of one matrix; write it again"
        ) from None
    except NotImplementedError:
        raise ValueError(
            f"{path} is an LTA of a type that cannot be converted; write it as "
            "LINEAR_RAS_TO_RAS or LINEAR_VOX_TO_VOX"
        ) from None
    return _checked(path, matrix)


def _checked(path, matrix):
    """A matrix that somebody else may have written."""
    if matrix.shape not in ((3, 3), (4, 4)) or not np.isfinite(matrix).all():
        raise ValueError(
            f"{path} does not hold a matrix of 4 x 4 numbers (3 x 3 for images of two "
            "dimensions); give the affine.txt that a registration wrote"
        )
    if not _is_affine(matrix):
        raise ValueError(
            f"{path} holds no affine transform: it cannot be inverted, or its last row "
            f"is not {_last_row(matrix)}"
        )
    return _exact(matrix)


def _exact(matrix):
    """A matrix without rounding errors in its last row, which DIPY refuses."""
    return np.vstack([matrix[:-1], np.eye(len(matrix))[-1]])


def _image(grid):
    """An image of a grid for nitransforms, which asks for shape and affine."""
    shape, grid2world = grid
    # No voxel of it takes memory.
    data = np.broadcast_to(np.uint8(0), shape)
    return nib.Nifti1Image(data, grid2world)


# -- displacement fields ----------------------------------------------------


def _write_field(path, step, fmt, static, moving):
    if fmt == "itk":
        itkfiles.write_itk(path, step)
    elif fmt == "x5" and step.field.shape[-1] == 3:
        _write_x5(
            path,
            step.field,
            (step.field.shape[:-1], step.grid2world),
            type="nonlinear",
            subtype="densefield",
            representation="displacements",
        )
    elif fmt == "fsl" and step.field.shape[-1] == 3:
        _write_fnirt(path, step, static, moving)
    elif fmt == "lta":
        raise ValueError("an LTA holds a matrix, not a map; use another format")
    else:
        raise ValueError(f"{fmt} has maps of three dimensions only; use itk")


def _write_x5(path, values, grid, **kind):
    from nitransforms.io import x5

    shape, grid2world = grid
    domain = x5.X5Domain(
        grid=True, size=shape, mapping=grid2world, coordinates="cartesian"
    )
    kind.setdefault("representation", "matrix")
    kinds = ("space", "space", "space", "vector")
    node = x5.X5Transform(
        transform=values, dimension_kinds=kinds, domain=domain, **kind
    )
    x5.to_filename(path, [node])


def _read_x5(path):
    from nitransforms.io import x5

    check_hdf5(path)
    try:
        (node,) = x5.from_filename(path)
        values = np.asarray(node.transform, dtype=np.float64)
        if node.type == "linear":
            return _checked(path, values.reshape(4, 4))
        if node.representation != "displacements" or not np.isfinite(values).all():
            raise ValueError
        return Displacements(
            values.reshape(*node.domain.size, 3),
            np.reshape(node.domain.mapping, (4, 4)),
        )
    except BROKEN:
        raise ValueError(
            f"{path} cannot be read as an X5 file of one matrix or one field of "
            "displacements; write it again"
        ) from None


def _fsl_grid2world(grid):
    """From the coordinates that FSL gives a grid's points to world coordinates.

    Millimetres along the grid's axes from the first voxel, the first axis mirrored
    where the grid is not (a positive determinant).
    """
    shape, grid2world = grid
    zooms = voxel_sizes(grid2world)
    mirror, shift = np.ones(3), np.zeros(3)
    if np.linalg.det(grid2world) > 0:
        mirror[0], shift[0] = -1, (shape[0] - 1) * zooms[0]
    return grid2world @ np.linalg.inv(from_matvec(np.diag(mirror * zooms), shift))


def _write_fnirt(path, step, static, moving):
    """Displacements between FSL's coordinates of both images, on the static grid."""
    points = points_of(*static)
    there = points + sample_field(step.field, points, step.grid2world)
    to_static, to_moving = (np.linalg.inv(_fsl_grid2world(g)) for g in (static, moving))
    field = apply_affine(to_moving, there) - apply_affine(to_static, points)
    image = nib.Nifti1Image(field.astype(np.float32), static[1])
    image.header["intent_code"] = 2006  # FSL_FNIRT_DISPLACEMENT_FIELD
    image.header.set_xyzt_units("mm")
    image.set_qform(static[1], code=1)
    nib.save(image, path)


def _read_fsl(path, static, moving):
    if not path.name.endswith(_NIFTI):
        from nitransforms.io.fsl import FSLLinearTransform as Flirt

        matrix = _read_text(path)
        if len(matrix) != 4:
            raise ValueError(f"{path} is of two dimensions, which FSL's are not")
        return Flirt(matrix).to_ras(reference=_image(static), moving=_image(moving))
    image = _load(path)
    field = np.asarray(image.dataobj)
    grid = image.shape[:3], np.asarray(image.affine, dtype=np.float64)
    if field.ndim != 4 or field.shape[3] != 3 or field.dtype.kind not in "iuf":
        raise ValueError(
            f"{path} has shape {field.shape}, but a map of FSL's has (X, Y, Z, 3)"
        )
    if int(image.header["intent_code"]) not in (0, 2006):
        raise ValueError(
            f"{path} holds coefficients of FNIRT's; make displacements of them, with "
            "fnirtfileutils --withaff"
        )
    if not np.isfinite(field).all():
        raise ValueError(f"{path} contains NaN or infinity; write it again")
    points = points_of(*grid)
    to_static, from_moving = (
        np.linalg.inv(_fsl_grid2world(grid)),
        _fsl_grid2world(moving),
    )
    there = apply_affine(from_moving, apply_affine(to_static, points) + field)
    return Displacements(there - points, grid[1])


def _map_of(steps, static, moving):
    """The map that leads through all steps, on the static image's grid.

    The affine transform that comes closest is set apart, so that the rest can be
    inverted by a fixed-point iteration.
    """
    shape, grid2world = static
    dim = len(shape)
    if any(np.shape(s)[-1] != dim + 1 for s in steps if isinstance(s, np.ndarray)):
        raise ValueError(f"the transform is not of {dim} dimensions, as the images are")
    points = points_of(shape, grid2world)
    there = points
    for step in steps:
        if isinstance(step, Displacements):
            if step.field.shape[-1] != dim:
                raise ValueError(
                    f"the transform is not of {dim} dimensions, as the images are"
                )
            there = there + sample_field(step.field, there, step.grid2world)
        else:
            there = apply_affine(step, there)
    matrix = _closest_affine(points, there)
    field = apply_affine(np.linalg.inv(matrix), there) - points
    field = np.ascontiguousarray(field, dtype=np.float32)
    invert = (invert_vector_field_fixed_point_2d, invert_vector_field_fixed_point_3d)
    back = invert[dim - 2](
        field,
        np.linalg.inv(grid2world),
        voxel_sizes(grid2world),
        _ITERATIONS,
        _TOLERANCE,
    )
    mapping = both_ways(
        np.asarray(back),
        field,
        grid2world,
        static=static,
        moving=moving,
        prealign=np.linalg.inv(matrix),
    )
    if _way_back(points, field, np.asarray(back), grid2world) > _APART:
        warnings.warn(
            "the map folds, so that its way back from moving to static space is wrong "
            "in places; the way there is right",
            stacklevel=3,
        )
    return mapping


def _way_back(points, field, back, grid2world):
    """How many voxels the way there and back leads apart, but for 5 % of them."""
    there = points + field
    voxels = apply_affine(np.linalg.inv(grid2world), there)
    ends = np.array(field.shape[:-1]) - 1
    inside = ((voxels >= 0) & (voxels <= ends)).all(axis=-1)
    if not inside.any():
        return 0.0
    apart = sample_field(back, there[inside], grid2world) + field[inside]
    apart = np.linalg.norm(apart, axis=-1) / voxel_sizes(grid2world).mean()
    return np.percentile(apart, 95)


def _closest_affine(points, there):
    """The affine transform that comes closest to taking points `there`."""
    dim = points.shape[-1]
    points, there = points.reshape(-1, dim), there.reshape(-1, dim)
    every = -(-len(points) // _FITTED)
    points, there = points[::every], there[::every]
    center = points.mean(axis=0)
    ones = np.ones((len(points), 1))
    found = np.linalg.lstsq(np.hstack([points - center, ones]), there - points)[0]
    linear = np.eye(dim) + found[:dim].T
    if np.linalg.det(linear) < 0.05:
        linear = np.eye(dim)
    shift = (there - points).mean(axis=0) + center - linear @ center
    return from_matvec(linear, shift)
