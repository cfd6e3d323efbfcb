"""Diffeomorphic maps as files that DIPY reads.

A file holds the displacements of both directions, shape (X, Y, Z, 3, 2), and its affine
is, as DIPY has it, the inverse of the grid's.
"""

from dipy.align.imwarp import DiffeomorphicMap
from dipy.io.image import save_nifti
import numpy as np

from dipy_ppir.workflows.inputs import InputError, read_nifti


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
    if matrix is not None:
        dim, inverse = mapping.dim, np.linalg.inv(matrix)
        before, after = _room(mapping)
        padding = [*zip(before, after, strict=True), (0, 0)]
        to_moving, to_static = (np.pad(f, padding) for f in (to_moving, to_static))
        shift = np.eye(dim + 1)
        shift[:dim, dim] = -np.array(before)
        grid2world = grid2world @ shift
        points = np.moveaxis(np.indices(to_moving.shape[:-1], dtype=np.float64), 0, -1)
        points = points @ grid2world[:dim, :dim].T + grid2world[:dim, dim]
        moved = points + to_moving
        to_moving = moved @ matrix[:dim, :dim].T + matrix[:dim, dim] - points
        # The field is wanted at points of the moving space, and known at static ones.
        back = points @ inverse[:dim, :dim].T + inverse[:dim, dim]
        to_static = back + _sample(to_static, back, grid2world) - points
    field = np.stack([to_static, to_moving], axis=-1)
    return field.astype(np.float32), grid2world


def _room(mapping):
    """Voxels to add before and after each axis so that the moving image fits in.

    None, if the grid would become more than eight times as large: then the way back
    holds where the grids overlap.
    """
    shape, dim = np.array(mapping.disp_shape), mapping.dim
    ends = np.array(mapping.domain_shape) - 1
    corners = np.array(np.meshgrid(*[(0, n) for n in ends])).reshape(dim, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    to_field = np.linalg.inv(mapping.disp_grid2world) @ mapping.domain_grid2world
    corners = (to_field @ corners)[:dim]
    before = np.maximum(np.ceil(-corners.min(axis=1)), 0).astype(int)
    after = np.maximum(np.ceil(corners.max(axis=1)) - shape + 1, 0).astype(int)
    if np.prod(shape + before + after) > 8 * np.prod(shape):
        return np.zeros(dim, int), np.zeros(dim, int)
    return before, after


def _sample(field, points, grid2world):
    from scipy.ndimage import map_coordinates

    dim = field.shape[-1]
    world2grid = np.linalg.inv(grid2world)
    voxels = np.moveaxis(
        points @ world2grid[:dim, :dim].T + world2grid[:dim, dim], -1, 0
    )
    return np.stack(
        [
            map_coordinates(field[..., i], voxels, order=1, mode="constant")
            for i in range(dim)
        ],
        axis=-1,
    )


def save_mapping(path, mapping):
    """Write a map as DIPY does."""
    field, grid2world = displacements(mapping)
    save_nifti(path, field, np.linalg.inv(grid2world))


def load_mapping(
    path, static_shape, static_grid2world, moving_shape, moving_grid2world
):
    """Read a map that `save_mapping` or DIPY wrote.

    Raises
    ------
    InputError
        if the file holds anything else.
    """
    data, affine = read_nifti(path, "the displacement field")
    if data.ndim != 5 or data.shape[3:] != (3, 2):
        raise InputError(
            f"the displacement field {path} has shape {data.shape}, but a map has "
            "(X, Y, Z, 3, 2); give the file that dipy_ppir_align_syn wrote"
        )
    if data.dtype.kind not in "iuf":
        raise InputError(
            f"the displacement field {path} must hold real numbers, not {data.dtype}"
        )
    if abs(np.linalg.det(affine)) < 1e-12:
        raise InputError(
            f"the affine of the displacement field {path} is singular; give the file "
            "that dipy_ppir_align_syn wrote"
        )
    if not np.isfinite(data).all():
        raise InputError(
            f"the displacement field {path} contains NaN or infinity; register again"
        )
    mapping = DiffeomorphicMap(
        3,
        data.shape[:3],
        disp_grid2world=np.linalg.inv(affine),
        domain_shape=moving_shape,
        domain_grid2world=moving_grid2world,
        codomain_shape=static_shape,
        codomain_grid2world=static_grid2world,
    )
    mapping.forward = np.ascontiguousarray(data[..., 0], dtype=np.float32)
    mapping.backward = np.ascontiguousarray(data[..., 1], dtype=np.float32)
    mapping.is_inverse = True
    return mapping
