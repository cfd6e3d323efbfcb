"""What the commands have in common: naming outputs, explaining mistakes."""

import argparse
from contextlib import contextmanager
import glob
import logging
import os
from pathlib import Path

from dipy.workflows.multi_io import io_iterator
from dipy.workflows.workflow import Workflow

from dipy_ppir.workflows.inputs import InputError, check_not_dicom

logger = logging.getLogger("dipy_ppir")


class OutputFilesFlow(Workflow):
    """A workflow whose files are written by `OutputFiles`."""

    def rows(self, read, out_dir, written):
        """Rows of names: of files to read, and of those to write for them.

        As ``Workflow.get_io_iterator``, but a file that exists is read whatever its
        name: square brackets make no pattern of it. Whether files may be replaced is
        for `OutputFiles` to decide, which knows what is written.

        Parameters
        ----------
        read : sequence of str or Path
            names or patterns.
        out_dir : str or Path
        written : sequence of str

        Returns
        -------
        rows : list

        Raises
        ------
        InputError
            if they name no files, or different numbers of them.
        """
        with _explained():
            return list(
                io_iterator(
                    [_pattern(name) for name in read],
                    out_dir,
                    written,
                    output_strategy=self._output_strategy,
                    mix_names=self._mix_names,
                )
            )


def _pattern(name):
    """The pattern that stands for what the user named."""
    path = Path(name)
    if not path.exists():
        return name
    check_not_dicom(path)
    if not glob.has_magic(str(name)):
        return name
    return glob.escape(str(path)) + ("/*" if path.is_dir() else "")


@contextmanager
def _explained():
    """Turn what ``io_iterator`` raises into an `InputError`."""
    try:
        yield
    except ImportError:
        raise InputError(
            "the static and moving patterns name different numbers of files; give one "
            "of each, or one static image for many moving images"
        ) from None
    except ValueError as exc:
        if "inhomogeneous" not in str(exc):
            raise
        raise InputError(
            "the patterns name different numbers of files; give one of each, or one "
            "static image and one transform for many moving images"
        ) from None
    except OSError as exc:
        if not str(exc).startswith("File not found"):
            raise
        raise InputError(f"{exc}; check the name of the file") from None


def written_files(jobs):
    """All files of a list of (inputs, outputs by name), which must differ."""
    written = [f for _, files in jobs for f in files.values()]
    if len(jobs) > 1 and len(set(written)) < len(written):
        raise InputError(
            f"{len(jobs)} pairs would all be written to the same files; add "
            "--mix_names, or --out_strat append"
        )
    return written


def pictures(kinds):
    """The pictures to make, by file name: none without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        logger.info(
            "No pictures, because matplotlib is not installed (it comes with "
            "dipy-ppir[report])"
        )
        return {}
    return kinds


def check_name(name, flag, endings=()):
    """Refuse an empty name of an output, or one with another ending."""
    if not str(name) or not Path(name).name:
        raise InputError(f"--{flag} is empty; give the name of a file")
    if endings and not str(name).endswith(endings):
        raise InputError(
            f"--{flag} {name} must end in {' or '.join(endings)}; change the name"
        )


def beside(file, given, name):
    """Path of another output beside `file`, which was `given` on the command line."""
    file = Path(file)
    return file.parent / (file.name.removesuffix(Path(given).name) + name)


def short_name(path):
    """Name of a file, cut off for a title; bytes that are no text are replaced."""
    name = os.fsencode(Path(path).name).decode("utf-8", "replace")
    return name if len(name) < 34 else name[:31] + "..."


class Heeded(argparse.Action):
    """A flag that was heeded already, and that no workflow is given."""

    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, argparse.SUPPRESS, **options)

    def __call__(self, *_):
        """Do nothing."""
