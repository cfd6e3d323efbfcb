"""One pair of a cohort: the command that registers it, as a process of its own.

What runs here may be another machine than the coordinator's (see `engine`), with the
same files.
"""

from contextlib import suppress
from dataclasses import dataclass
import os
from pathlib import Path
import subprocess
import sys
import threading
import time

from dipy_ppir.mpc.errors import SessionFileError
from dipy_ppir.mpc.ledger import MOVING, ROLES, STATIC
from dipy_ppir.mpc.sessionfile import SessionFile
from dipy_ppir.workflows.cohortplan import same_work
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.outcomes import Outcome
from dipy_ppir.workflows.receiptfile import load, printable
from dipy_ppir.workflows.watched import GRACE

SESSION, RECEIPT, LOG = "session.toml", "receipt.json", "log.txt"
#: What says in the folder of a pair that was registered here what was asked for.
DONE = "done.toml"
#: What an owner gets, by operation.
RESULTS = {
    "affine": "affine.txt",
    "syn": "displacement_field.nii.gz",
    "freeform": "displacement_field.nii.gz",
    "points": "affine.txt",
}
#: Bytes at the end of a log in which its last word is looked for.
_TAIL = 1 << 14

_running, _lock = set(), threading.Lock()


@dataclass(frozen=True)
class Task:
    """A pair that is to be registered.

    Attributes
    ----------
    name, moving, static : str
    folder : str
        of its files.
    command : str
    arguments : list of str
        of the command.
    text : str
        the session file.
    here : bool
        whether both images are on this machine, and there is no session.
    threads : int or None
        that the command may use; None for what the library decides.
    """

    name: str
    moving: str
    static: str
    folder: str
    command: str
    arguments: list
    text: str
    here: bool
    threads: int | None

    def outcome(self, status, **facts):
        """What became of it, see `Outcome`."""
        return Outcome(self.name, self.moving, self.static, status, **facts)


def run(task):
    """Register a pair, and say what became of it.

    The command writes into the log of the pair, and ends with this process.

    Parameters
    ----------
    task : Task

    Returns
    -------
    outcome : Outcome
    """
    folder = Path(task.folder)
    start = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not task.here:
            _write(folder / SESSION, task.text)
        log = folder / LOG
        begin = log.stat().st_size if log.exists() else 0
        status = _command(task, log)
    except OSError as exc:
        place = exc.filename or folder
        return task.outcome("failed", error=f"{exc.strerror or exc} ({place})")
    seconds = round(time.monotonic() - start, 1)
    if status:
        error = last_word(log, begin, task.command)
        if error is None:
            how = f"status {status}" if status > 0 else f"signal {-status}"
            error = f"the command ended with {how} and without a word; see its log"
        return task.outcome("failed", seconds=seconds, error=error)
    if task.here:
        _write(folder / DONE, task.text)
    return task.outcome("done", seconds=seconds, **facts(folder / RECEIPT))


def stop():
    """End the commands that run in this process's care, and wait for them."""
    with _lock:
        processes = list(_running)
    for process in processes:
        with suppress(OSError):
            process.stdin.close()
    end = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()


def _command(task, log):
    """Exit status of the command of a task."""
    argv = [sys.executable, "-P", "-m", "dipy_ppir.workflows.watched", task.command]
    # Parties that share processors wait for one another in threads that spin.
    environment = dict(os.environ)
    if task.threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(task.threads))
    with open(log, "ab") as stream:
        process = subprocess.Popen(
            [*argv, *task.arguments],
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=stream,
            env={**environment, "PYTHONUNBUFFERED": "1"},
            # Ctrl-C is for the coordinator, which ends all of them.
            start_new_session=True,
        )
    with _lock:
        _running.add(process)
    try:
        return process.wait()
    finally:
        with _lock:
            _running.discard(process)
        with suppress(OSError):
            process.stdin.close()


def last_word(log, begin, command):
    """The line by which a command said why it ended; None if there is none.

    Parameters
    ----------
    log : Path
    begin : int
        byte of the log at which the command began to write.
    command : str
    """
    with open(log, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(begin, size - _TAIL))
        text = stream.read().decode("utf-8", "replace")
    # What the log says of others begins with the level of the line.
    said = [line for line in text.splitlines() if line.startswith(f"{command}: ")]
    if not said:
        return None
    return printable(said[-1].removeprefix(f"{command}: ").removeprefix("error: "), 500)


def facts(receipt):
    """What the table of outcomes says of a receipt; see `Outcome`."""
    found = load(receipt)
    return {
        "bytes": found["bytes_total"],
        "warnings": "; ".join(found["warnings"]),
        "bits_moving_owner": found["bits"][ROLES[MOVING]],
        "bits_static_owner": found["bits"][ROLES[STATIC]],
        "receipt": str(receipt),
    }


def state(folder, session, text, result=None):
    """How far a pair has come in an earlier run, by its folder.

    Parameters
    ----------
    folder : Path
    session : SessionFile or None
        what is asked for; None without sessions.
    text : str
        the same as text.
    result : str, optional
        name of a file that is there if all is.

    Returns
    -------
    state : str
        "new", "unfinished", "finished", or "other" if it is of another plan.
    """
    receipt, kept = folder / RECEIPT, folder / (DONE if session is None else SESSION)
    if not kept.exists():
        if not receipt.exists():
            return "new"
        return "unfinished" if session is None else "other"
    if session is None:
        same = kept.read_text() == text
        done = receipt.exists() and (folder / result).exists()
        return "other" if not same else ("finished" if done else "unfinished")
    try:
        earlier = SessionFile.read(kept)
    except SessionFileError:
        return "other"
    if not same_work(earlier, session):
        return "other"
    try:
        digest = load(receipt)["session_file"]
    except InputError:
        return "unfinished"
    there = result is None or (folder / result).exists()
    return "finished" if digest == earlier.digest and there else "unfinished"


def _write(path, text):
    """Write a small file whole, or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)
