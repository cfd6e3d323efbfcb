"""What makes the receipts of one run a record: its number, and what they state alike.

At the start of a run the parties exchange fresh random numbers, of which the run's own
is made. At its end each makes the *common part* of its receipt, which must be the same
at all three, and they exchange its digest, which sites sign. Whoever has the receipts
can tell that they belong together, and that nobody's common part was changed since.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import cache
import hashlib
import json
import os
from os import PathLike
from pathlib import Path
import re
import time
from typing import Any

import numpy as np
import numpy.typing as npt

import dipy_ppir
from dipy_ppir.mpc.errors import ProtocolError
from dipy_ppir.mpc.identity import signed_by
from dipy_ppir.mpc.ledger import ROLES

#: Entries of a receipt that all parties state alike.
COMMON = (
    "run",
    "date",
    "title",
    "session_file",
    "deal",
    "parties",
    "operation",
    "images",
    "static_grid2world",
    "moving_grid2world",
    "parameters",
    "voxels",
    "m",
    "t",
    "insecure",
    "fields",
    "source",
)
#: Packages whose versions are the same at all parties.
COMPARED = ("dipy_ppir", "dipy", "mpyc", "numpy")
#: What separates clocks that are right from others.
_CLOCKS = timedelta(minutes=10)
_DATE = "%Y-%m-%dT%H:%M:%SZ"


# -- at the start ------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run that has begun.

    Attributes
    ----------
    number : str
        SHA-256 of the session file's hash and of a fresh random number of each party,
        in the order of the roles.
    date : str
        when it began by the first party's clock (the moving owner's), UTC.
    own_date : str
        the same by this party's.
    clock : float
        the same by `time.monotonic`.
    """

    number: str
    date: str
    own_date: str
    clock: float

    @property
    def duration(self):
        """Seconds since it began."""
        return round(time.monotonic() - self.clock, 1)


def greeting():
    """What a party says at the start of a run, JSON-able."""
    now = datetime.now(timezone.utc)
    return {"nonce": os.urandom(16).hex(), "date": now.strftime(_DATE)}


def begin(greetings, pid, session_file=None, roles=ROLES):
    """The run that the parties' greetings begin.

    Parameters
    ----------
    greetings : dict
        maps each party number to its `greeting`, as it arrived.
    pid : int
        this party.
    session_file : str, optional
        hash of the session file.
    roles : dict, optional
        maps party numbers to the names of their roles.

    Returns
    -------
    run : Run

    Raises
    ------
    ProtocolError
        if a party sent something else.
    """
    total = hashlib.sha256(bytes.fromhex(session_file or ""))
    for party in sorted(roles):
        said = greetings[party] if isinstance(greetings[party], dict) else {}
        if not is_hex(said.get("nonce"), 32) or parse_date(said.get("date")) is None:
            raise ProtocolError(
                f"the {roles[party]} did not begin the run as it should; install the "
                "same version of dipy_ppir everywhere",
                party,
            )
        total.update(bytes.fromhex(said["nonce"]))
    dates = [greetings[party]["date"] for party in (min(roles), pid)]
    return Run(total.hexdigest(), *dates, time.monotonic())


def parse_date(text):
    """The time that a receipt writes as text; None if it is none."""
    if not isinstance(text, str) or len(text) != 20:
        return None
    try:
        return datetime.strptime(text, _DATE)
    except ValueError:
        return None


def is_hex(text, digits):
    """Whether something is a text of so many hexadecimal digits, in small letters."""
    return isinstance(text, str) and bool(re.fullmatch(f"[0-9a-f]{{{digits}}}", text))


# -- at the end --------------------------------------------------------------


def common_part(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """What the receipts of all parties state alike.

    Openings are those since the run began or was last resumed: what was under way at an
    interruption one party may have counted and another not.
    """
    opened = receipt.get("last_attempt") or receipt["learned"]
    versions = {name: receipt["versions"].get(name) for name in COMPARED}
    part = {name: receipt.get(name) for name in COMMON}
    return {**part, "versions": versions, "learned": opened}


def common_digest(receipt: Mapping[str, Any]) -> str:
    """SHA-256 of the common part of a receipt."""
    text = json.dumps(_plain(common_part(receipt)), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(obj):
    """Numbers that compare as equal are written alike: 3 and 3.0."""
    if isinstance(obj, dict):
        return {key: _plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_plain(value) for value in obj]
    if isinstance(obj, float) and obj.is_integer():
        return int(obj)
    return obj


def statement(pid, digest, roles=ROLES):
    """What a party signs: its role, and the digest of its common part."""
    return f"dipy_ppir receipt of the {roles[pid]}: {digest}".encode()


def tie(views, pid, run, parties=None, roles=ROLES):
    """What the other parties say of the run they were in, for the receipt.

    Parameters
    ----------
    views : dict
        maps each party number to what it sent: the digest of its common part as
        ``common``, ``signature`` and ``certificate``; of a peer anything.
    pid : int
        this party.
    run : Run or None
    parties : dict, optional
        maps party numbers to `Party`, whose certificates sign.
    roles : dict, optional
        maps party numbers to the names of their roles.

    Returns
    -------
    facts : dict
        ``common`` digests and ``signatures`` by role, and ``warnings``.
    """
    common, signatures, warnings = {}, {}, []
    for party, role in roles.items():
        view = views[party] if isinstance(views[party], dict) else {}
        digest = view.get("common")
        common[role] = digest if is_hex(digest, 64) else None
        if common[role] != views[pid]["common"]:
            warnings.append(
                f"What the {role} has on record of this run is not what this receipt "
                "says: compare the receipts of all with dipy_ppir_receipt."
            )
        if parties is None or common[role] is None:
            continue
        signed = {name: view.get(name) for name in ("signature", "certificate")}
        if signed_by(
            parties[party].fingerprint, statement(party, digest, roles), signed
        ):
            # As this program writes it, whatever a peer wrote.
            signed["signature"] = bytes.fromhex(signed["signature"]).hex()
            signatures[role] = signed
        else:
            warnings.append(
                f"The {role} did not sign what it has on record of this run: have it "
                "check its key, and compare its receipt with dipy_ppir_receipt."
            )
    if run is not None:
        apart = abs(parse_date(run.date) - parse_date(run.own_date))
        if apart > _CLOCKS:
            warnings.append(
                f"The run began at {run.date} by the {roles[min(roles)]}'s clock and "
                f"at {run.own_date} by this party's: set the clock that is wrong."
            )
    return {"common": common, "signatures": signatures, "warnings": warnings}


# -- digests -----------------------------------------------------------------


@cache
def source_digest():
    """SHA-256 of the package's source files as they are installed, names included.

    Compiled kernels differ from machine to machine and are left out; the digest of
    their sources is in a file that the build writes, and so part of it.
    """
    folder, total = Path(dipy_ppir.__file__).parent, hashlib.sha256()
    files = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*.py")}
    for name, file in sorted(files.items()):
        data = file.read_bytes()
        total.update(f"{name}\0{len(data)}\0".encode() + data)
    return total.hexdigest()


def file_hash(run: str, path: str | PathLike[str]) -> str:
    """SHA-256 of a run's number and a file, as ``(printf RUN; cat FILE) | sha256sum``.

    It shows who has the file that it was this one, and cannot be compared with that of
    another run.

    Parameters
    ----------
    run : str
    path : str or Path
    """
    total = hashlib.sha256(run.encode())
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def array_hash(run: str, array: npt.ArrayLike) -> str:
    """SHA-256 of a run's number, and of an array's type, shape and bytes.

    Parameters
    ----------
    run : str
    array : array
    """
    array = np.ascontiguousarray(array)
    total = hashlib.sha256(f"{run}{array.dtype.str}{array.shape}".encode())
    total.update(array.data.cast("B") if array.size else b"")
    return total.hexdigest()
