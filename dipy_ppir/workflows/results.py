"""What a registration found, as files."""

from dipy.align.imaffine import AffineMap
from dipy.io.image import save_nifti
import numpy as np

from dipy_ppir.align.mappings import write_mapping
from dipy_ppir.align.remote import RemoteImage
from dipy_ppir.align.transformfiles import write_transform


def save_transform(path, transform):
    """Write a matrix or a map as DIPY does."""
    if isinstance(transform, np.ndarray):
        np.savetxt(path, transform)
    else:
        write_mapping(transform, path)


def save_itk(path, transform):
    """Write a matrix or a map as ITK does, in the form that the ending says."""
    write_transform(path, transform, fmt="itk")


def save_inverse(path, transform, image, grids):
    """Write the static image on the moving image's grid.

    Parameters
    ----------
    path : Path
    transform : array, shape (4, 4), or DiffeomorphicMap
        from static to moving space.
    image : array, shape (S, R, C)
        the static image.
    grids : dict
        `RemoteImage` of "static" and "moving".
    """
    static, moving = grids["static"], grids["moving"]
    if isinstance(transform, np.ndarray):
        transform = AffineMap(
            transform,
            domain_grid_shape=static.shape,
            domain_grid2world=static.grid2world,
            codomain_grid_shape=moving.shape,
            codomain_grid2world=moving.grid2world,
        )
    save_nifti(path, transform.transform_inverse(image), moving.grid2world)


def grids_of(images):
    """The grids of two images that were loaded, see `save_inverse`."""
    return {
        name: RemoteImage(images[name].shape, images[f"{name}_grid2world"])
        for name in ("static", "moving")
    }


def grids_in(receipt):
    """The grids of the two images of a run, see `save_inverse`."""
    return {
        name: RemoteImage(grid["shape"], receipt[f"{name}_grid2world"])
        for name, grid in receipt["images"].items()
    }
