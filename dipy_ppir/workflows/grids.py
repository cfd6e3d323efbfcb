"""Grids of images that one may not have."""

from pathlib import Path

import numpy as np

from dipy_ppir.align.remote import RemoteImage
from dipy_ppir.workflows import receiptfile
from dipy_ppir.workflows.inputs import InputError, open_nifti


def read_grid(path, name):
    """The grid of an image, of its file or of the receipt of a registration.

    Who took part in a session has one image only; of the other its receipt says where
    its voxels are.

    Parameters
    ----------
    path : str or Path
        NIfTI, or a receipt (.json).
    name : str
        "static" or "moving".

    Returns
    -------
    grid : RemoteImage

    Raises
    ------
    InputError
        if it says nothing of a grid of three dimensions.
    """
    if Path(path).suffix == ".json":
        return _of_receipt(path, name)
    image = open_nifti(path, f"the {name} image")
    if len(image.shape) < 3:
        raise InputError(
            f"the {name} image {path} has {len(image.shape)} dimensions, but images "
            "need three dimensions here"
        )
    if image.get_data_dtype().kind not in "biuf":
        raise InputError(
            f"the {name} image must hold real numbers, not {image.get_data_dtype()}; "
            "convert it"
        )
    return RemoteImage(image.shape[:3], image.affine)


def _of_receipt(path, name):
    receipt = receiptfile.load(path)
    images, matrix = receipt["images"], receipt.get(f"{name}_grid2world")
    try:
        grid = RemoteImage(images[name]["shape"], matrix)
        usable = np.isfinite(grid.grid2world).all() and grid.dim == 3
        if matrix is None or not usable or abs(np.linalg.det(grid.grid2world)) < 1e-12:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"the receipt {path} does not say where the voxels of a {name} image of "
            "three dimensions are; give the receipt of a registration of such images"
        ) from None
    return grid
