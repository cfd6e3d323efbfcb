"""Stands where the other site's image would be."""

import numpy as np


class RemoteImage:
    """An image that another party holds: its grid is public, its voxels are not.

    Parameters
    ----------
    shape : sequence of int
        shape of the image, (S, R, C) or (R, C).
    grid2world : array, shape (dim + 1, dim + 1), optional
        the voxel-to-space transformation of the image, mm. Identity by default.

    Raises
    ------
    ValueError
        if shape and matrix do not belong together.

    Examples
    --------
    >>> from dipy_ppir.align import RemoteImage
    >>> RemoteImage((91, 109, 91)).dim
    3
    """

    def __init__(self, shape, grid2world=None):
        self.shape = tuple(int(n) for n in shape)
        self.dim = self.ndim = len(self.shape)
        if self.dim not in (2, 3) or min(self.shape) < 1:
            raise ValueError(
                f"a remote image has two or three positive dimensions, got {shape}"
            )
        if grid2world is None:
            grid2world = np.eye(self.dim + 1)
        self.grid2world = np.array(grid2world, dtype=np.float64)
        if self.grid2world.shape != (self.dim + 1, self.dim + 1):
            raise ValueError(
                f"grid2world of a {self.dim}D image has shape "
                f"({self.dim + 1}, {self.dim + 1}), got {self.grid2world.shape}"
            )

    def __repr__(self):
        return f"RemoteImage(shape={self.shape})"

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            "this image belongs to another party: its voxels are not available here"
        )


def check_roles(pid, static, moving):
    """Raise ValueError unless each image is at its owner and nowhere else.

    Parameters
    ----------
    pid : int
        this party's number: 0 owns the moving image, 1 the static one.
    static, moving : array or RemoteImage
    """
    for name, image, owner in (("moving", moving, 0), ("static", static, 1)):
        if is_remote(image) == (pid == owner):
            wanted = "needs" if pid == owner else "must not have"
            instead = "" if pid == owner else "; pass a RemoteImage in its place"
            raise ValueError(f"party {pid} {wanted} the {name} image{instead}")


def is_remote(image):
    """Whether `image` is held by another party."""
    return isinstance(image, RemoteImage)


def grid2world_of(image, given):
    """Voxel-to-space transformation of an image: its own, `given`, or the identity."""
    if is_remote(image):
        return image.grid2world
    if given is None:
        return np.eye(len(image.shape) + 1)
    return np.asarray(given, dtype=np.float64)
