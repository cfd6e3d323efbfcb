"""What a party keeps so that an interrupted registration can go on.

Each party writes down its own state only: its half of the map, the numbers that were
opened to it, or, of halves of a map that stay on shares, its own part, which is uniform
by itself. A registration that goes on is a new session with new keys, in which the
parties agree on the last state that all of them have and do what follows again.
"""

from contextlib import contextmanager, suppress
from copy import deepcopy
import hashlib
import json
import os
from pathlib import Path
import re
import secrets
import shutil
import time
from zipfile import BadZipFile

import numpy as np

from dipy_ppir.mpc.errors import PeerError, ProtocolError
from dipy_ppir.mpc.ledger import MOVING

#: States kept; parties are never further apart than one.
KEPT = 2
_STATE = re.compile(r"state-(\d{1,12})\.npz")
_FACTS, _JOURNAL = "registration.json", "journal.jsonl"
_RUN = re.compile("[0-9a-f]{32}")


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or belongs to another registration."""


class Checkpoint:
    """A folder with the state of one registration at one party.

    Parameters
    ----------
    folder : str or Path
        made when first written to; nobody else can read what is in it.
    resume : bool, optional
        whether to go on with what is there. All parties must say the same.
    interval : float, optional
        seconds between two states of a diffeomorphic registration; the moving
        owner's counts.
    """

    def __init__(self, folder, *, resume=False, interval=30.0):
        self.folder = Path(folder)
        self.resume, self.interval = bool(resume), float(interval)
        self._last = -np.inf
        #: Number of the run that is continued or begun, the same at all parties.
        self.run = None

    # -- life cycle ------------------------------------------------------

    def check(self, facts):
        """Raise CheckpointError if what is there belongs to another registration.

        Parameters
        ----------
        facts : dict
            what must be the same, JSON-able: parameters, and digests of images.
        """
        if not self.resume:
            return
        try:
            there = json.loads((self.folder / _FACTS).read_text())
        except FileNotFoundError:
            return  # nothing to go on with: all parties start from the beginning
        except (OSError, ValueError):
            raise CheckpointError(
                f"the checkpoint {self.folder} cannot be read; start anew at all "
                "parties, without --resume"
            ) from None
        facts = json.loads(json.dumps(facts))
        if isinstance(there, dict):
            self.run = _run(there.pop("run", None))
        keys = sorted(set(there) | set(facts)) if isinstance(there, dict) else ["it"]
        for key in keys:
            if keys == ["it"] or there.get(key) != facts.get(key):
                raise CheckpointError(
                    f"the checkpoint {self.folder} belongs to another registration "
                    f"({key} differs); use what the interrupted run used, or start "
                    "anew at all parties, without --resume"
                )

    def begin(self, facts, *, run=None):
        """Start to write; see `check`.

        What was there is set aside without `resume`, or when a new `run` begins.
        """
        if run is None:
            self.check(facts)
        with _writing(self.folder):
            if run is not None or not self.resume:
                self.set_aside()
                self.run = run
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # A record that was cut off must not be continued.
            whole = (json.dumps(record) + "\n" for record in self.records())
            self._write(_JOURNAL, "".join(whole).encode())
            facts = {**facts, "run": self.run}
            self._write(_FACTS, json.dumps(facts, indent=1).encode())

    def discard(self):
        """Remove everything: the registration is finished."""
        if (self.folder / _FACTS).exists():
            shutil.rmtree(self.folder)

    def set_aside(self):
        """Begin anew: what was opened before stays on record beside the folder."""
        if not self.records():
            self.discard()
            return
        old, number = self.folder.with_name(self.folder.name + ".old"), 1
        while old.exists():
            number += 1
            old = self.folder.with_name(f"{self.folder.name}.old-{number}")
        # What was opened stays on record; states, which may be shares, do not.
        self.forget_after(None)
        os.replace(self.folder, old)

    @contextmanager
    def hint(self, needs=""):
        """Add to an interruption how to go on, if there is something to go on with.

        Parameters
        ----------
        needs : str, optional
            what else it takes.
        """
        try:
            yield
        except (KeyboardInterrupt, SystemExit) as exc:
            if self.run is not None:
                exc.add_note(f"add --resume, at all parties, to go on{needs}")
            raise

    # -- a journal of small records --------------------------------------

    def append(self, record):
        """Add one JSON-able record."""
        with _writing(self.folder), open(self.folder / _JOURNAL, "ab") as stream:
            stream.write(json.dumps(record).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def records(self):
        """The records so far; one that was cut off in the middle is left out."""
        try:
            lines = (self.folder / _JOURNAL).read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        records = []
        for line in lines[:-1]:
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    # -- states ----------------------------------------------------------

    @property
    def due(self):
        """Whether it is time for another state."""
        return time.monotonic() - self._last >= self.interval

    def save(self, number, facts, arrays):
        """Write a state, whole or not at all; the oldest ones go.

        Parameters
        ----------
        number : int
            which state; parties compare them.
        facts : dict
            JSON-able.
        arrays : dict
            names to arrays.
        """
        text = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
        arrays = {f"array_{name}": array for name, array in arrays.items()}
        with self._replacing(f"state-{number}.npz") as stream:
            np.savez(stream, facts=text, **arrays)
        for old in sorted(self.numbers())[:-KEPT]:
            (self.folder / f"state-{old}.npz").unlink()
        self._last = time.monotonic()

    def forget_after(self, number):
        """Remove the states after `number`, all with None: they are done again."""
        for newer in self.numbers():
            if number is None or newer > number:
                (self.folder / f"state-{newer}.npz").unlink()

    def numbers(self):
        """The states that are there."""
        if not self.folder.is_dir():
            return []
        names = (_STATE.fullmatch(p.name) for p in self.folder.iterdir())
        return sorted(int(match[1]) for match in names if match)

    def load(self, number):
        """Facts and arrays of a state; see `save`."""
        try:
            with open(self.folder / f"state-{number}.npz", "rb") as stream:
                state = dict(np.load(stream, allow_pickle=False))
            facts = json.loads(state.pop("facts").tobytes())
            arrays = {k.removeprefix("array_"): v for k, v in state.items()}
        except (OSError, ValueError, KeyError, TypeError, BadZipFile) as exc:
            raise CheckpointError(
                f"state {number} of the checkpoint {self.folder} cannot be read "
                f"({type(exc).__name__}); start anew at all parties, without --resume"
            ) from None
        return facts, arrays

    # -- files -----------------------------------------------------------

    def _write(self, name, data):
        with self._replacing(name) as stream:
            stream.write(data)

    @contextmanager
    def _replacing(self, name):
        """A stream to a file that gets its name when it is whole."""
        temporary = self.folder / f".{name}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with _writing(self.folder):
            try:
                with open(os.open(temporary, flags, 0o600), "wb") as stream:
                    yield stream
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(temporary, self.folder / name)
            finally:
                temporary.unlink(missing_ok=True)


@contextmanager
def _writing(folder):
    try:
        yield
    except OSError as exc:
        raise CheckpointError(
            f"cannot write the checkpoint {folder}: {exc.strerror}; free some space, "
            "or choose another output folder"
        ) from None


def digest(*arrays):
    """SHA-256 of arrays, None for those that are not here."""
    total = hashlib.sha256()
    for array in arrays:
        if array is None:
            total.update(b"none")
            continue
        array = np.ascontiguousarray(array)
        total.update(f"{array.dtype.str}{array.shape}".encode())
        total.update(memoryview(array).cast("B") if array.size else b"")
    return total.hexdigest()


def begin_or_resume(session, checkpoint, facts):
    """Begin to write, or find out whether to go on; all parties together.

    A run goes on where all parties have what it wrote. It begins anew where nothing
    had been opened when it was interrupted. Rounds: 1, and 1 to begin anew.

    Parameters
    ----------
    session : Session
        its ledger counts on from where the interrupted run was.
    checkpoint : Checkpoint
    facts : dict
        what the run must have in common with the interrupted one, JSON-able.

    Returns
    -------
    resumed : bool

    Raises
    ------
    CheckpointError
        if what is here belongs to another registration, or a party does not have what
        the others have; all parties raise the latter.
    """
    checkpoint.check(facts)
    mine = {
        "run": checkpoint.run,
        "records": len(checkpoint.records()) if checkpoint.resume else 0,
        "new": secrets.token_hex(16),
    }
    with session.phase("agreement"):
        views = session.exchange("checkpoint", mine)
        runs, records, new = {}, 0, None
        for pid, view in views.items():
            view = view if isinstance(view, dict) else {}
            runs[pid], number = _run(view.get("run")), view.get("records")
            new = _run(view.get("new")) if pid == MOVING else new
            if type(number) is not int or number < 0:
                raise ProtocolError(
                    f"{session.name_of(pid)} describes no checkpoint; check that all "
                    "parties run the same version",
                    pid,
                )
            records += number
        if new is None:
            raise ProtocolError("the moving owner gives the run no number", MOVING)
        if None not in runs.values() and len(set(runs.values())) == 1:
            checkpoint.begin(facts)
            _restore_ledger(session, checkpoint)
            journal(session, checkpoint)
            return True
        if records:
            with suppress(PeerError):
                session.exchange("disagreement", None)
            without = [p for p in sorted(runs) if runs[p] is None]
            names = " and ".join(map(session.name_of, without))
            raise CheckpointError(
                (f"{names} did not find" if without else "the parties do not have")
                + " the checkpoint of the interrupted run: name the output folder of "
                "that run, or start anew at all parties, without --resume"
            )
        checkpoint.begin(facts, run=new)
        # Nothing is opened before all have a folder that says so.
        session.exchange("begun", None)
    return False


def _run(text):
    """The number of a run, None if it is none."""
    return text if isinstance(text, str) and _RUN.fullmatch(text) else None


def _restore_ledger(session, checkpoint):
    """Count on from where the interrupted run was; see `journal`."""
    ledgers = [r["ledger"] for r in checkpoint.records() if "ledger" in r]
    if ledgers:
        session.ledger.add(ledgers[-1])


def journal(session, checkpoint, **record):
    """Write down a step, and what was opened and sent so far."""
    if checkpoint is not None:
        checkpoint.append({**record, "ledger": session.ledger.state()})


def journal_ahead(session, checkpoint, openings, **record):
    """Write down what is about to be opened as if it were.

    An owner that has a result and goes on as if it had not been given one is counted
    both.

    Parameters
    ----------
    session : Session
    checkpoint : Checkpoint or None
    openings : dict
        maps labels to who receives how many numbers, of how many bits each.
    **record
        see `journal`.
    """
    if checkpoint is not None:
        ledger = deepcopy(session.ledger)
        for label, (receivers, values, bits) in openings.items():
            ledger.record_opening(label, receivers, values, bits)
        checkpoint.append({**record, "ledger": ledger.state()})


def agree_on_state(session, checkpoint):
    """The newest state that all parties have; None to start from the beginning."""
    numbers = checkpoint.numbers()
    with session.phase("agreement"):
        views = session.exchange("checkpoints", numbers)
    common = set(numbers)
    for view in views.values():
        whole = isinstance(view, list) and all(type(n) is int for n in view)
        common &= set(view) if whole else set()
    return max(common, default=None)
