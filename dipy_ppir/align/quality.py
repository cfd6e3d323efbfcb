"""How regular a diffeomorphic map is."""

import numpy as np


def jacobian_determinant(field, grid2world):
    r"""Determinant of the Jacobian of a displacement field, voxel by voxel.

    .. math:: \det(I + \partial u / \partial x)

    by central differences. It is the factor by which the map changes the volume around
    a voxel; where it is not positive, the map folds.

    Parameters
    ----------
    field : array, shape (S, R, C, 3) or (R, C, 2)
        displacements u, mm.
    grid2world : array, shape (dim + 1, dim + 1)
        voxel-to-space transformation of the field's grid, mm.

    Returns
    -------
    determinant : array of float32, shape (S, R, C) or (R, C)
    """
    field = np.asarray(field, dtype=np.float32)
    dim = field.shape[-1]
    if grid2world is None:
        grid2world = np.eye(dim + 1)
    world2grid = np.linalg.inv(np.asarray(grid2world)[:dim, :dim]).astype(np.float32)
    jacobian = {}
    for i in range(dim):
        slopes = np.gradient(field[..., i])
        for j in range(dim):
            slope = sum(slopes[k] * world2grid[k, j] for k in range(dim))
            jacobian[i, j] = slope + 1 if i == j else slope
    if dim == 2:
        return jacobian[0, 0] * jacobian[1, 1] - jacobian[0, 1] * jacobian[1, 0]
    minors = [
        jacobian[1, j] * jacobian[2, k] - jacobian[1, k] * jacobian[2, j]
        for j, k in ((1, 2), (2, 0), (0, 1))
    ]
    return sum(jacobian[0, j] * minor for j, minor in enumerate(minors))


def map_quality(mapping):
    """What the receipt says about a map.

    Parameters
    ----------
    mapping : DiffeomorphicMap

    Returns
    -------
    quality : dict
        with ``voxels``, ``non_positive_jacobian`` and the same in ``percent``, and the
        smallest and largest determinant.
    """
    determinant = jacobian_determinant(
        mapping.get_forward_field(), mapping.disp_grid2world
    )
    folded = int(np.count_nonzero(determinant <= 0))
    return {
        "voxels": determinant.size,
        "non_positive_jacobian": folded,
        "percent": 100.0 * folded / determinant.size,
        "smallest_jacobian": float(determinant.min()),
        "largest_jacobian": float(determinant.max()),
    }
