"""What callers pass: objects of the right kind, or a ValueError that says which.

The kinds of mistakes are few: the name of a file where what is in it is due, a class
where one of its objects is, an object in a list where the list is.
"""

from pathlib import Path

from dipy.align.transforms import Transform
import nibabel as nib
import numpy as np

from dipy_ppir.align.checkpoint import Checkpoint
from dipy_ppir.align.remote import is_remote, is_word
from dipy_ppir.align.validation import check_dimensions, check_size
from dipy_ppir.mpc.session import Session

_READ_IMAGE = (
    "read a file with nibabel first: image = nibabel.load(name), then "
    "image.get_fdata() and image.affine"
)
_READ_MATRIX = (
    "pass an array; read a text file with numpy.loadtxt first, and of an AffineMap "
    "take its affine"
)


def described(value):
    """What somebody passed, for messages."""
    if isinstance(value, (str, Path)):
        return f"the text {str(value)!r:.200}"
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    return f"an object of type {type(value).__name__}"


def check_instance(value, kind, name, remedy):
    """Raise ValueError unless `value` is of the class `kind`, or None.

    Parameters
    ----------
    value : object
    kind : type or tuple of type
    name : str
        of the argument.
    remedy : str
    """
    if value is not None and not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(k.__name__ for k in kinds)
        raise ValueError(f"{name} must be a {wanted}, got {described(value)}; {remedy}")


def check_run(session, checkpoint, callback):
    """Raise ValueError unless these are a session, a checkpoint and a function.

    Each may be None.
    """
    check_instance(
        session, Session, "session", "open one with Session.load(name of its file)"
    )
    check_instance(
        checkpoint,
        Checkpoint,
        "checkpoint",
        "make one with Checkpoint(name of a folder)",
    )
    if callback is not None and not callable(callback):
        raise ValueError(
            f"callback must be a function, got {described(callback)}; pass one that "
            "takes what the documentation says, or leave it out"
        )


def check_transform(transform, dim):
    """Raise ValueError unless this is an object of a transform of `dim` dimensions."""
    if not isinstance(transform, Transform):
        raise ValueError(
            f"transform must be a Transform, got {described(transform)}; pass one of "
            f"dipy.align.transforms, for example AffineTransform{dim}D()"
        )
    if transform.get_dim() != dim:
        raise ValueError(
            f"{type(transform).__name__} is for images of {transform.get_dim()} "
            f"dimensions, but these have {dim}; pass its counterpart"
        )


def check_numbers(value, name, remedy):
    """An array of real numbers, or ValueError.

    Floating-point numbers that are less or more than DIPY computes with become such:
    half of single precision would overflow in sums.
    """
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise ValueError(
            f"{name} has masked values, which would be used as if they were not; "
            "pass its filled(0), and for an affine registration what is not masked as "
            "static_mask or moving_mask"
        )
    try:
        array = None if isinstance(value, (str, Path, type)) else np.asarray(value)
    except (TypeError, ValueError):
        array = None
    if array is None or array.dtype.kind in "OUSV":
        raise ValueError(f"{name} must hold numbers, got {described(value)}; {remedy}")
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    if array.dtype.kind == "f" and array.dtype.itemsize not in (4, 8):
        with np.errstate(over="ignore"):  # infinity is refused by itself
            array = array.astype(np.float32 if array.itemsize < 4 else np.float64)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def read_image(image, grid2world, name):
    """An image and its affine, of an array, a nibabel image or the name of a file.

    Parameters
    ----------
    image : array, nifti image, str, Path or RemoteImage
        or the word for another party's image.
    grid2world : array or None
        in place of the image's own.
    name : str
        "static" or "moving", for messages.

    Returns
    -------
    image : array, RemoteImage or the word
    grid2world : array or None
    """
    if is_word(image):
        return image, None
    if is_remote(image):
        return image, image.grid2world
    if isinstance(image, (str, Path)):
        image = _load(image, name)
    if isinstance(image, nib.spatialimages.SpatialImage):
        # Before all of it is read.
        check_dimensions(image, name)
        check_size(image.shape, f"the {name} image")
        if image.get_data_dtype().kind not in "biuf":
            raise ValueError(
                f"the {name} image must hold real numbers, not "
                f"{image.get_data_dtype()}; convert it"
            )
        grid2world = image.affine if grid2world is None else grid2world
        image = image.get_fdata()
    image = image_array(image, name)
    if grid2world is None:
        raise ValueError(
            f"{name}_affine is missing: an array does not say where its voxels are; "
            "pass the image's affine, for example nibabel.load(name).affine"
        )
    return image, matrix_array(grid2world, f"{name}_affine")


def _load(path, name):
    try:
        return nib.load(path)
    except nib.filebasedimages.ImageFileError:
        raise ValueError(
            f"the {name} image {path} cannot be read by nibabel; convert it to NIfTI, "
            "DICOM with dcm2niix, or copy it again if it is damaged"
        ) from None


def image_array(image, name):
    """An image as an array of numbers, or a `RemoteImage` as it is; else ValueError."""
    if is_remote(image):
        return image
    return check_numbers(image, f"the {name} image", _READ_IMAGE)


def mask_array(mask, name):
    """A mask as an array of numbers; None stays None; else ValueError."""
    if mask is None:
        return None
    mask = check_numbers(mask, f"{name}_mask", _READ_IMAGE)
    if not np.isfinite(mask).all():
        raise ValueError(
            f"{name}_mask contains NaN or infinity; pass zeros outside and ones inside"
        )
    return mask


def matrix_array(matrix, name):
    """A matrix as an array of float; None stays None; else ValueError."""
    if matrix is None:
        return None
    array = check_numbers(matrix, name, _READ_MATRIX)
    if array.dtype.kind == "c":
        raise ValueError(
            f"{name} must hold real numbers, got {described(array)}; {_READ_MATRIX}"
        )
    return array.astype(np.float64)


def parameters_array(params0, transform):
    """Parameters of a transform as an array of float; None stays None."""
    if params0 is None:
        return None
    params0 = matrix_array(params0, "params0")
    count = transform.get_number_of_parameters()
    if params0.shape != (count,) or not np.isfinite(params0).all():
        raise ValueError(
            f"params0 must be {count} finite numbers, which {type(transform).__name__} "
            f"has, got shape {params0.shape}; leave it out to start with the identity"
        )
    return params0
