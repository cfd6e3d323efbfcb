"""Which file a pseudonym of a plan is: each site's own table, which is never sent.

A text file with tabs between columns and their names in the first line, as BIDS has
them: ``participant_id``, ``file`` and, if wanted, ``mask``.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

from dipy_ppir.workflows import inputs
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.points import load_points

#: Larger files are no tables of images.
_MAX_BYTES = 1 << 22
_COLUMNS = ("participant_id", "file", "mask")
#: What BIDS writes where there is nothing.
_NOTHING = ("", "n/a")


@dataclass(frozen=True)
class ImageFile:
    """The files of one pseudonym.

    Attributes
    ----------
    file : Path
    mask : Path or None
    """

    file: Path
    mask: Path | None = None


def read_images(path):
    """Read a table of images.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    images : dict
        maps pseudonyms to `ImageFile`; names of files are relative to the table's
        folder.

    Raises
    ------
    InputError
        that names the line and the remedy.
    """
    path = Path(path)
    try:
        with open(path, "rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
        text = data.decode("utf-8-sig")
    except OSError as exc:
        raise InputError(
            f"cannot read the table of images {path}: {exc.strerror}; check its name"
        ) from None
    except UnicodeDecodeError:
        raise InputError(
            f"the table of images {path} is not UTF-8; save it so"
        ) from None
    if len(data) > _MAX_BYTES:
        raise InputError(f"{path} is too large for a table of images")
    rows = list(csv.reader(text.splitlines(), "excel-tab", quoting=csv.QUOTE_NONE))
    header = rows[0] if rows else []
    if not {"participant_id", "file"} <= set(header):
        raise InputError(
            f"the first line of {path} must name the columns participant_id and file, "
            "with a tab between them"
        )
    images = {}
    for number, row in enumerate(rows[1:], 2):
        if not any(cell.strip() for cell in row):
            continue
        where = f"{path}, line {number}"
        if len(row) != len(header):
            raise InputError(
                f"{where}: {len(row)} entries, but {len(header)} columns; put one tab "
                "between two entries"
            )
        entries = dict(zip(header, (cell.strip() for cell in row), strict=True))
        name, file, mask = (entries.get(column, "") for column in _COLUMNS)
        if name in images:
            raise InputError(f"{where}: {name!r:.100} is in the table twice")
        if name in _NOTHING or file in _NOTHING:
            raise InputError(f"{where}: participant_id or file is empty")
        images[name] = ImageFile(
            (path.parent / file).absolute(),
            None if mask in _NOTHING else (path.parent / mask).absolute(),
        )
    return images


def check_images(images, wanted, operation, parameters):
    """Refuse images that cannot be registered, before anybody is met.

    Which are missing, unreadable, or not one volume.

    Parameters
    ----------
    images : dict
        see `read_images`.
    wanted : dict
        maps pseudonyms to "moving" if they are so in any pair, else to "static".
    operation : str
    parameters : Parameters
        of the plan.

    Raises
    ------
    InputError
    """
    missing = sorted(set(wanted) - set(images))
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise InputError(
            f"the plan has pairs with {', '.join(missing[:5])}{more}, of which the "
            "table of images says nothing; add a line with participant_id and file"
        )
    for name, part in sorted(wanted.items()):
        image, what = images[name], f"the image of {name}"
        if operation == "points":
            load_points(image.file, part, parameters.precision)
        else:
            # DIPY's SyN takes one slice.
            moves = part == "moving" and operation != "syn"
            inputs.check_volume(image.file, what, moves=moves)
        if image.mask is None:
            continue
        if operation != "affine":
            raise InputError(
                f"{name} has a mask, which only affine registration knows; leave the "
                "column mask out"
            )
        if parameters.sampling_proportion not in (None, 1):
            raise InputError(
                f"{name} has a mask, and masks need all voxels; leave the column mask "
                "out, or sampling_proportion out of the plan at all sites"
            )
        inputs.check_volume(image.mask, f"the mask of {name}")
