"""Files beside a site's key, in which its commands count over all runs."""

from contextlib import contextmanager
import fcntl
import json
import os
from pathlib import Path

from dipy_ppir.workflows.inputs import InputError


class CountFile:
    """A file (JSON) in which a site counts.

    Parameters
    ----------
    file : str or Path
    empty : list or dict
        what it holds before anything was counted.
    fits : callable
        whether what it holds is a count.
    about : str
        what is counted, to be said after "which counts".
    """

    def __init__(self, file, empty, fits, about):
        self.file, self._empty, self._fits = Path(file), empty, fits
        self._about = about

    def read(self):
        """What was counted so far.

        Raises
        ------
        InputError
            if it cannot be read.
        """
        try:
            counts = json.loads(self.file.read_text())
        except FileNotFoundError:
            return type(self._empty)(self._empty)
        except (OSError, ValueError):
            counts = None
        if not isinstance(counts, type(self._empty)) or not self._fits(counts):
            raise InputError(
                f"{self.file}, which counts {self._about}, cannot be read; mend it, or "
                "move it away to begin to count anew"
            )
        return counts

    @contextmanager
    def alone(self):
        """Keep out other runs at this site that are about to count."""
        lock = self.file.with_name(f".{self.file.name}.lock")
        try:
            descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT, 0o600)
        except OSError as exc:
            raise self._cannot_write(exc) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def write(self, counts):
        """Put something else in its place; to be called within `alone`.

        Raises
        ------
        InputError
            if it cannot be written.
        """
        temporary = self.file.with_name("." + self.file.name)
        try:
            with open(
                os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w"
            ) as f:
                json.dump(counts, f, indent=1)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, self.file)
        except OSError as exc:
            raise self._cannot_write(exc) from None

    def _cannot_write(self, exc):
        return InputError(
            f"cannot write {self.file}, which counts {self._about}: {exc.strerror}"
        )
