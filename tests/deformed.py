"""Two images, the one a smooth deformation of the other."""

import numpy as np
from scipy import ndimage


def deformed(dim, shape=None, seed=0):
    """A textured body, and the same moved by a smooth deformation."""
    shape = shape or ((48, 44) if dim == 2 else (30, 28, 26))
    rng = np.random.default_rng(seed)
    at = np.indices(shape).astype(float)
    middle = (np.array(shape).reshape((dim,) + (1,) * dim) - 1) / 2
    body = (((at - middle) / (0.42 * (2 * middle + 1))) ** 2).sum(axis=0) < 1
    texture = ndimage.gaussian_filter(rng.standard_normal(shape), 2.0)
    static = ndimage.gaussian_filter(body * (1 + texture / texture.std() / 4), 0.7)
    shift = ndimage.gaussian_filter(
        rng.standard_normal((dim, *shape)), (0,) + (6,) * dim
    )
    shift *= 1.8 / np.abs(shift).max()
    moving = ndimage.map_coordinates(static, at + shift, order=1)
    return static, moving
