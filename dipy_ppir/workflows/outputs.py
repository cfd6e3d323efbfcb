"""Files that appear whole, all together, or not at all."""

from contextlib import contextmanager
import glob
import logging
import os
from pathlib import Path
import secrets
import shutil
import signal

from dipy_ppir.workflows.inputs import InputError

logger = logging.getLogger("dipy_ppir")


class OutputFiles:
    """The output files of one run.

    Each file is written under a temporary name in its own folder, and all are
    renamed at the very end. As a context manager it removes what is left over.

    Parameters
    ----------
    paths : sequence of Path
        all files that the run will write.
    inputs : sequence of str or Path
        files that must not be overwritten, whatever `force` says.
    force : bool, optional
        whether files of these names may be replaced.

    Raises
    ------
    InputError
        if a file could not be written at the end, before anything is computed.
    """

    #: Files that have been given their final names by this process.
    written = 0

    def __init__(self, paths, inputs, *, force=False):
        self._temporary = {}
        paths = [Path(p) for p in paths]
        inputs = [Path(p) for p in inputs]
        real = [p.resolve() for p in paths]
        for path in paths:
            if real.count(path.resolve()) > 1:
                raise InputError(f"two outputs would both be called {path}; rename one")
            if path.resolve() in {p.resolve() for p in inputs}:
                raise InputError(
                    f"output {path} is also an input and would be overwritten; choose "
                    "another --out_dir or file name"
                )
            if path.is_dir():
                raise InputError(f"output {path} is a folder; choose another file name")
        there = [str(p) for p in paths if p.exists()]
        if there and not force:
            verb = "is" if len(there) == 1 else "are"
            raise InputError(
                f"{', '.join(there)} {verb} there already; add --force to overwrite, "
                "or choose another --out_dir"
            )
        for folder in {p.parent for p in paths}:
            _check_writable(folder)

    def temporary(self, path):
        """Name under which to write the file that will be called `path`."""
        path = Path(path)
        name = f".{secrets.token_hex(4)}.{path.name}"
        self._temporary[path] = path.with_name(name)
        return self._temporary[path]

    @staticmethod
    def left_over(path):
        """What has a temporary name for `path`: of runs that are on, or were killed."""
        path = Path(path)
        digits = "[0-9a-f]" * 8
        return sorted(path.parent.glob(f".{digits}.{glob.escape(path.name)}"))

    def attempt(self, path, write):
        """Write a file without which the run is complete: a picture, a report.

        Parameters
        ----------
        path : str or Path
        write : callable
            takes the temporary name.

        Returns
        -------
        written : bool
            False if it raised an error, which is logged.
        """
        path = Path(path)
        try:
            write(self.temporary(path))
        except Exception as exc:
            self._temporary.pop(path).unlink(missing_ok=True)
            logger.warning(
                "%s could not be made (%s: %s); the results do not depend on it",
                path.name,
                type(exc).__name__,
                exc,
            )
            return False
        return True

    def commit(self, *paths):
        """Give files, all if none are named, their final names.

        Not to be interrupted half-way.
        """
        mask = {signal.SIGINT, signal.SIGTERM}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, mask)
        try:
            for path, temporary in list(self._temporary.items()):
                if paths and path not in paths:
                    continue
                os.replace(temporary, path)
                del self._temporary[path]
                OutputFiles.written += 1
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __enter__(self):
        return self

    def __exit__(self, kind, exc, trace):
        for temporary in self._temporary.values():
            temporary.unlink(missing_ok=True)
        self._temporary = {}


@contextmanager
def new_folders(paths):
    """Folders for files that are about to be written; removed if left empty.

    Parameters
    ----------
    paths : sequence of Path
        the files.
    """
    missing = {f for path in paths for f in path.parents if not f.exists()}
    try:
        try:
            for path in paths:
                path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise InputError(
                f"cannot make the output folder {path.parent} ({exc.strerror}); choose "
                "another --out_dir"
            ) from None
        yield
    finally:
        for folder in sorted(missing, key=lambda f: len(f.parts), reverse=True):
            try:
                folder.rmdir()
            except OSError:
                pass


def _check_writable(folder):
    # Trying is the only sure test: permissions, read-only mounts, quotas.
    probe = folder / f".{secrets.token_hex(4)}.probe"
    try:
        probe.touch()
        probe.unlink()
    except OSError as exc:
        raise InputError(
            f"cannot write to the output folder {folder.resolve()} "
            f"({exc.strerror or exc}); choose another --out_dir"
        ) from None
    if shutil.disk_usage(folder).free == 0:
        raise InputError(
            f"no space is left for the output folder {folder.resolve()}; free some, or "
            "choose another --out_dir"
        )
