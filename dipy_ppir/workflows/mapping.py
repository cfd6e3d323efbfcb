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
        displacements from static to moving world coordinates, mm, and back.
    """
    to_moving = np.asarray(mapping.get_forward_field(), dtype=np.float64)
    to_static = np.asarray(mapping.get_backward_field(), dtype=np.float64)
    matrix = mapping.prealign_inv if mapping.is_inverse else mapping.prealign
    if matrix is not None:
        dim, inverse = mapping.dim, np.linalg.inv(matrix)
        grid2world = mapping.disp_grid2world
        points = np.moveaxis(np.indices(to_moving.shape[:-1], dtype=np.float64), 0, -1)
        points = points @ grid2world[:dim, :dim].T + grid2world[:dim, dim]
        moved = points + to_moving
        to_moving = moved @ matrix[:dim, :dim].T + matrix[:dim, dim] - points
        # The field is wanted at points of the moving space, and known at static ones.
        back = points @ inverse[:dim, :dim].T + inverse[:dim, dim]
        to_static = back + _sample(to_static, back, grid2world) - points
    field = np.stack([to_static, to_moving], axis=-1)
    return field.astype(np.float32)


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
    save_nifti(path, displacements(mapping), np.linalg.inv(mapping.disp_grid2world))


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
    if not np.isfinite(data).all():
        raise InputError(f"the displacement field {path} contains NaN or infinity")
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
