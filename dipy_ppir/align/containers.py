"""Looking through files in HDF5 and of MATLAB before they are read.

Both formats can say what no transform says, and reading would believe it: numbers that
are in another file of this machine, more of them than any memory holds, or objects
instead. What is found here is in the header of the file; no number is read.
"""

import math
from pathlib import Path

import h5py
from scipy.io import matlab, whosmat

#: Numbers that a file may hold: a displacement field of 645 voxels along each axis.
MOST_NUMBERS = 3 * 2**28
#: Groups, datasets, and letters of a text: more is in no file of transforms.
_MOST_OBJECTS, _MOST_LETTERS = 10_000, 1 << 16
#: Bytes that one compressed byte can stand for; of deflate it is 1032 (RFC 1951).
_EXPANSION = 1100
#: What these functions, h5py and SciPy raise for files that are broken.
BROKEN = (
    *(KeyError, ValueError, TypeError, IndexError, OverflowError, AttributeError),
    *(OSError, RuntimeError, MemoryError, NotImplementedError, matlab.MatReadError),
)


def check_hdf5(path):
    """Refuse a file in HDF5 that must not be read, or cannot be.

    Parameters
    ----------
    path : str or Path

    Raises
    ------
    ValueError
        if it leads to other files, holds anything but numbers and short texts, or more
        of them than its length allows.
    """
    try:
        with h5py.File(path, "r") as file:
            problem = _problem(file, Path(path).stat().st_size)
    except (FileNotFoundError, PermissionError):
        raise
    except BROKEN as exc:
        raise ValueError(
            f"{path} cannot be read, as it is not HDF5 or is damaged; write it again"
        ) from exc
    if problem:
        raise ValueError(
            f"{path} is refused, because it {problem}; have it written again by the "
            "program that it is from"
        )


def _problem(file, length):
    """What is wrong with a file that is open; None if nothing is."""
    count, numbers, left = 0, 0, [file]
    while left:
        group = left.pop()
        for name in group:
            # A group may be inside itself.
            count += 1
            if count > _MOST_OBJECTS:
                return "has more groups and datasets than transforms need"
            # Asked before it is followed.
            if type(group.get(name, getlink=True)) is not h5py.HardLink:
                return f"leads elsewhere by a link ({name[:60]!r})"
            found = group[name]
            if isinstance(found, h5py.Group):
                left.append(found)
                continue
            if not isinstance(found, h5py.Dataset):
                continue
            problem = _dataset_problem(found, length)
            if problem:
                return problem
            if found.dtype.kind in "iuf":
                numbers += found.size or 0
    if numbers > MOST_NUMBERS:
        return f"says that it holds {numbers:,} numbers, over {MOST_NUMBERS:,}"
    return None


def _dataset_problem(found, length):
    if found.external or found.is_virtual:
        return "takes numbers from other files"
    size, kind = (found.size or 0) * found.dtype.itemsize, found.dtype.kind
    if kind == "S" or h5py.check_string_dtype(found.dtype) is not None:
        return (
            "holds longer texts than transforms need" if size > _MOST_LETTERS else None
        )
    if kind not in "iuf":
        return "holds something else than numbers and texts"
    if size > _EXPANSION * min(found.id.get_storage_size(), length):
        return f"says that {size:,} bytes of numbers are in {length:,}"
    return None


def check_mat(path):
    """Refuse a file of MATLAB that must not be read, or cannot be.

    Version 4 alone, which ITK and ANTs write, is simple enough to be trusted to.

    Parameters
    ----------
    path : str or Path

    Raises
    ------
    ValueError
        if it is of another version, or says more numbers than it is long.
    """
    path = Path(path)
    try:
        version, length = matlab.matfile_version(path)[0], path.stat().st_size
        shapes = [shape for _, shape, _ in whosmat(path)] if version == 0 else []
    except (FileNotFoundError, PermissionError):
        raise
    except BROKEN as exc:
        raise ValueError(
            f"{path} cannot be read as a file of MATLAB's version 4; write it again, "
            "as .h5 or as text"
        ) from exc
    if version:
        raise ValueError(
            f"{path} is a MATLAB file of a newer version than 4, which ITK and ANTs "
            'write; write it with save(..., "-v4"), or as .h5 or as text'
        )
    if any(math.prod(map(int, shape)) > length for shape in shapes):
        raise ValueError(
            f"{path} says that more numbers are in it than bytes; write it again"
        )
