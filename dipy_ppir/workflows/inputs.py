"""Reading what a user names on the command line, and refusing what cannot work.

Every refusal is an `InputError` whose message fits one line: what is wrong, in
which file or flag, and how to mend it.
"""

from contextlib import contextmanager
import itertools
import math
import os
from pathlib import Path

from dipy.workflows.utils import handle_vol_idx
import nibabel as nib
import numpy as np

from dipy_ppir.align import imaffine
from dipy_ppir.align.centers import world_center_of_mass
from dipy_ppir.align.validation import (
    check_image,
    check_mask,
    check_overlap,
    check_size,
)

#: How many times larger the contents of a file may be than the file, by its ending:
#: gzip's format does not allow more.
_EXPANSION = {".nii": 1, ".img": 1, ".gz": 1040}
#: Endings of DICOM files, and how many files of a folder are looked at.
_DICOM, _SOME = {".dcm", ".ima", ".dicom"}, 100


class InputError(ValueError):
    """A mistake in what the user gave; the message says how to mend it."""


def load_volume(path, name, vol_idx=None, *, function="affine_registration"):
    """Read one 3D volume from a NIfTI file.

    Parameters
    ----------
    path : str or Path
    name : str
        "static" or "moving", for messages and flags.
    vol_idx : str, int or sequence of int, optional
        volumes of a 4D series, averaged as in DIPY.
    function : str, optional
        what to call from Python with 2D images.

    Returns
    -------
    data : array, shape (S, R, C)
    grid2world : array, shape (4, 4)
        voxel-to-space transformation, mm.
    """
    flag = f"--{name}_vol_idx"
    data, grid2world = read_nifti(path, f"the {name} image")
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.dtype.kind not in "biuf":
        raise InputError(
            f"the {name} image {path} must hold real numbers, not {data.dtype}; "
            "convert it"
        )
    if data.ndim == 4:
        if vol_idx is None:
            raise InputError(
                f"the {name} image {path} has 4 dimensions ({data.shape[3]} volumes); "
                f"choose one with {flag}, for example {flag} 0"
            )
        data = data[..., _indices(vol_idx, data.shape[3], flag)].mean(axis=-1)
    elif vol_idx is not None:
        raise InputError(
            f"{flag} was given, but the {name} image {path} has no volumes to choose "
            f"from; leave out {flag}"
        )
    if data.ndim != 3:
        raise InputError(
            f"the {name} image {path} has {data.ndim} dimensions, 3 are needed; for 2D "
            f"images call dipy_ppir.align.{function} from Python"
        )
    explain(check_image, data, grid2world, name, file=path)
    return data, grid2world


#: Units of length that NIfTI has besides mm, by their codes.
_OTHER_UNITS = {1: "metres", 3: "micrometres"}


def of_header(path, name):
    """Concerns about where the header of a readable NIfTI file places its image.

    Parameters
    ----------
    path : str or Path
    name : str
        "static" or "moving".

    Returns
    -------
    concerns : list of str
        see `dipy_ppir.align.plausibility`.
    """
    header, file = nib.load(path).header, Path(path).name
    concerns = []
    if not int(header["qform_code"]) and not int(header["sform_code"]):
        concerns.append(
            f"the header of the {name} image {file} does not say its orientation "
            "(qform and sform codes are 0), left and right are guesses: convert it "
            "again from its source, or set its sform"
        )
    unit = _OTHER_UNITS.get(int(header["xyzt_units"]) % 8)
    if unit:
        concerns.append(
            f"the header of the {name} image {file} says that positions are in {unit}, "
            "they are taken as mm: convert its affine and voxel sizes to mm"
        )
    return concerns


def check_center(data, name):
    """Refuse an image whose centre of mass cannot be started from."""
    if np.sum(data, dtype=np.float64) == 0:
        raise InputError(
            f"the voxels of the {name} image add up to zero, so it has no centre of "
            "mass to start from; add a constant that makes the background zero"
        )
    explain(world_center_of_mass, data, np.eye(data.ndim + 1), f"the {name}")


def load_mask(path, image, grid2world, name):
    """Read a mask that belongs to an image.

    Parameters
    ----------
    path : str or Path
    image : array, shape (S, R, C)
    grid2world : array, shape (4, 4)
        of the image.
    name : str
        "static" or "moving".

    Returns
    -------
    mask : array of int32, shape (S, R, C)
        1 wherever the file is not zero.
    """
    mask, mask_grid2world = read_nifti(path, f"the {name} mask")
    while mask.ndim > 3 and mask.shape[-1] == 1:
        mask = mask[..., 0]
    if mask.dtype.kind not in "biuf" or not np.isfinite(mask).all():
        raise InputError(
            f"the {name} mask {path} does not hold finite numbers; write a mask of "
            "zeros and ones"
        )
    if not mask.any():
        raise InputError(
            f"the {name} mask {path} is empty (all zeros); give a mask with voxels in "
            f"it, or leave out --{name}_mask to use the whole image"
        )
    mask = (mask != 0).astype(np.int32)
    explain(check_mask, mask, image, name, file=path, of="mask")
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in image.shape])).reshape(3, -1)
    apart = (mask_grid2world - grid2world) @ np.vstack([corners, np.ones((1, 8))])
    voxel = np.linalg.norm(grid2world[:3, :3], axis=0).min()
    if np.abs(apart).max() > voxel / 2:
        raise InputError(
            f"the {name} mask {path} lies elsewhere in space than its image; resample "
            "the mask to the image's grid"
        )
    return mask


def check_pyramid(shape, grid2world, sigmas, factors):
    """Refuse factors and sigmas that leave nothing of the static image."""
    explain(imaffine.check_pyramid, shape, grid2world, factors)
    if max(sigmas) > max(shape):
        raise InputError(
            f"--sigmas {max(sigmas):g} (voxels) would blur away the static image of "
            f"{max(shape)} voxels; use smaller sigmas"
        )


def check_fields_of_view(static, static_grid2world, moving, moving_grid2world):
    """Refuse two images that lie apart in space."""
    try:
        check_overlap(static.shape, static_grid2world, moving.shape, moving_grid2world)
    except ValueError:
        raise InputError(
            "the two images do not overlap in space; correct their headers, or give "
            "--far_apart to start by aligning their centres of mass all the same"
        ) from None


def load_matrix(path, what):
    """Read an affine matrix between world coordinates, 4 x 4, from a text file.

    Those of FSL's are between its own coordinates of two images; by its numbers no
    matrix says so, but by its name.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{what} {path} is a folder; give the name of a file")
    if not path.is_file():
        raise InputError(f"{what} {path} does not exist; check the name of the file")
    try:
        matrix = np.loadtxt(path)
    except Exception:  # of numbers, or of unpacking a file that ends in .gz
        raise InputError(
            f"{what} {path} cannot be read as numbers; give the affine.txt that "
            "dipy_ppir_align_affine wrote"
        ) from None
    if path.suffix.lower() == ".mat":
        raise InputError(
            f"{what} {path} ends in .mat, as FSL's do, which are not between world "
            f"coordinates; convert it first: dipy_ppir_convert_transform {path} "
            "affine.txt --from_format fsl --to_format dipy --static STATIC --moving "
            "MOVING; or rename it to .txt, if it is the affine.txt of a registration"
        )
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        raise InputError(
            f"{what} {path} does not hold a 4 x 4 matrix of numbers; give the "
            "affine.txt that dipy_ppir_align_affine wrote"
        )
    if (
        abs(np.linalg.det(matrix[:3, :3])) < 1e-12
        or np.abs(matrix[3] - np.eye(4)[3]).max() > 1e-6
    ):
        raise InputError(
            f"{what} {path} is no affine transform: it cannot be inverted, or its last "
            "row is not 0 0 0 1"
        )
    # DIPY refuses rounding errors there.
    matrix[3] = np.eye(4)[3]
    return matrix


def explain(check, *args, file=None, of="image"):
    """What `check` returns; its ValueError becomes an `InputError`.

    The message says which file, where the check knows an image or mask only.
    """
    try:
        return check(*args)
    except ValueError as exc:
        text = str(exc)
        if file is not None:
            for name in ("static", "moving"):
                what = f"the {name} {of}"
                text = text.replace(what, f"{what} {file}", 1)
        raise InputError(text) from None


@contextmanager
def explained():
    """A `ValueError` of a registration becomes an `InputError`.

    Some things can be checked when both images are known, and not before: that they
    overlap, and that both together need no more memory than was agreed.
    """
    try:
        yield
    except ValueError as exc:
        if type(exc) is not ValueError:
            raise
        raise InputError(str(exc)) from exc


def _indices(vol_idx, count, flag):
    try:
        if isinstance(vol_idx, str):
            vol_idx = ",".join(vol_idx.replace(",", " ").split())
        indices = handle_vol_idx(vol_idx)
    except ValueError:
        indices = []
    if not indices or min(indices) < 0 or max(indices) >= count:
        raise InputError(
            f"{flag} {vol_idx} does not name volumes of this image; give indices from "
            f"0 to {count - 1}, for example {flag} 0 or {flag} 0,2-4"
        )
    return indices


def check_not_dicom(path):
    """Refuse a DICOM file, or a folder of such files."""
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = itertools.islice(path.rglob("*"), _SOME)
    if any(_is_dicom(file) for file in files):
        raise InputError(
            f"{path} is DICOM; convert it to NIfTI first, for example with "
            f"dcm2niix -z y {path if path.is_dir() else path.parent}"
        )


def _is_dicom(file):
    try:
        if not file.is_file():
            return False
        with open(file, "rb") as stream:
            magic = stream.read(132)[128:]
    except OSError:
        return False  # who reads it says so
    return magic == b"DICM" or file.suffix.lower() in _DICOM


def _check_header(image, path, what):
    """Refuse a header that the file contradicts, before memory is set aside for it."""
    damaged = f"{what} {path} is damaged or incomplete; copy or convert it again"
    shape = image.shape
    if not all(n > 0 for n in shape):
        sizes = " x ".join(map(str, shape))
        raise InputError(f"{damaged} (its header says that it has {sizes} voxels)")
    explain(check_size, shape[:3], f"{what} {path}")
    name = image.file_map["image"].filename
    there, ending = os.path.getsize(name), Path(name).suffix.lower()
    due = math.prod(shape) * image.get_data_dtype().itemsize
    if due > there * _EXPANSION.get(ending, math.inf):
        raise InputError(
            f"{damaged} (its header says that its voxels take {due:,} bytes, which "
            f"{there:,} cannot hold)"
        )


def open_nifti(path, what):
    """A NIfTI file whose header was read and checked, and no voxel yet.

    Parameters
    ----------
    path : str or Path
    what : str
        what it is called in messages.

    Returns
    -------
    image : nibabel.Nifti1Pair
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{what} {path} does not exist; check the name of the file")
    try:
        check_not_dicom(path)
        if path.is_dir():
            raise InputError(f"{what} {path} is a folder; give the name of a file")
        image = nib.load(path)
    except InputError:
        raise
    except PermissionError:
        raise InputError(
            f"{what} {path} may not be read by this user; ask for read permission"
        ) from None
    except Exception as exc:  # whatever damage may cause in the library
        raise InputError(
            f"{what} {path} cannot be read as NIfTI; convert it to .nii or .nii.gz, or "
            "copy it again if it is damaged"
        ) from exc
    if not isinstance(image, nib.Nifti1Pair):
        raise InputError(
            f"{what} {path} is not NIfTI but {type(image).__name__}; convert it to "
            ".nii or .nii.gz"
        )
    _check_header(image, path, what)
    return image


def check_volume(path, what, *, moves=False):
    """Refuse a file that is not one 3D image, by its header alone.

    For commands that have no flag to choose a volume with.

    Parameters
    ----------
    path : str or Path
    what : str
        for messages.
    moves : bool, optional
        whether its gradient is needed, which one slice does not have.
    """
    shape = open_nifti(path, what).shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        raise InputError(
            f"{what} {path} has {len(shape)} dimensions ({math.prod(shape[3:])} "
            "volumes); choose a volume and save it as a file of its own"
        )
    if len(shape) < 3:
        raise InputError(
            f"{what} {path} has {len(shape)} dimensions, 3 are needed; 2D images are "
            "registered by dipy_ppir.align, from Python"
        )
    if moves and min(shape) < 3:
        axis = shape.index(min(shape))
        raise InputError(
            f"{what} {path} has {shape[axis]} voxel{'s'[: shape[axis] != 1]} along "
            f"axis {axis}: it has no gradient there, and nothing would move; give an "
            "image with at least 3 slices"
        )


def load_header(path, what):
    """Shape and place of an image in a NIfTI file, whose voxels are not read.

    Parameters
    ----------
    path : str or Path
    what : str
        for messages.

    Returns
    -------
    shape : tuple of int
        of one volume, if it is a series.
    grid2world : array, shape (4, 4), or None
        None for a 2D image.
    """
    image = open_nifti(path, what)
    shape = tuple(int(n) for n in image.shape[:3])
    return shape, np.asarray(image.affine) if len(shape) == 3 else None


def read_nifti(path, what):
    """Voxels in this machine's byte order, and the affine, of a NIfTI file."""
    image = open_nifti(path, what)
    try:
        data = np.asarray(image.dataobj)
    except MemoryError:
        raise
    except Exception as exc:
        raise InputError(
            f"{what} {path} is damaged or incomplete (its voxels cannot be read); copy "
            "or convert it again"
        ) from exc
    if data.dtype.kind == "f" and data.dtype.itemsize > 8:
        data = data.astype(np.float64)
    if data.dtype.fields is None:
        data = data.astype(data.dtype.newbyteorder("="), copy=False)
    return data, np.asarray(image.affine, dtype=np.float64)


def proportion_of(percent):
    """The part of the voxels that ``--sampling_prop`` asks for; None for all.

    Parameters
    ----------
    percent : float or None
        as in DIPY.
    """
    if percent in (None, 100):
        return None
    if not 1 <= percent <= 100:
        hint = ""
        if 0 < percent < 1:
            hint = f" (for {percent:.0%} of the voxels: {100 * percent:g})"
        raise InputError(
            f"--sampling_prop {percent:g} is out of range: give a percentage of the "
            f"voxels from 1 to 100{hint}, or leave it out to use all"
        )
    return percent / 100
