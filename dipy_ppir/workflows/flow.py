"""What the commands have in common: naming outputs, explaining mistakes."""

from contextlib import contextmanager
import logging
from pathlib import Path

from dipy.workflows.workflow import Workflow

from dipy_ppir.workflows.inputs import InputError

logger = logging.getLogger("dipy_ppir")


class OutputFilesFlow(Workflow):
    """A workflow whose files are written by `OutputFiles`."""

    def manage_output_overwrite(self):
        """Leave the decision to `OutputFiles`, which knows what is written."""
        return True


@contextmanager
def explained():
    """Turn what ``Workflow.get_io_iterator`` raises into an `InputError`."""
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
            "dipy-ppir[demo])"
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
    """Name of a file, cut off for a title."""
    name = Path(path).name
    return name if len(name) < 34 else name[:31] + "..."
