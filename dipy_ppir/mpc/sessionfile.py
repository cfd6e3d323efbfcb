"""The session file: what the three parties agreed on before they connect.

A TOML file that all parties hold alike. It names the parties and pins their
certificates, and says what is computed, what may be revealed and who gets the result.
Which party this process is follows from its own certificate.
"""

import codecs
from contextlib import suppress
from dataclasses import dataclass
import hashlib
import ipaddress
import json
import math
from pathlib import Path
import re
import tomllib

from dipy_ppir.mpc.errors import SessionFileError
from dipy_ppir.mpc.identity import parse_fingerprint
from dipy_ppir.mpc.ledger import HELPER, MOVING, ROLES, STATIC

#: Names of the parties' tables in the file.
TABLES = {"moving": MOVING, "static": STATIC, "helper": HELPER}
RESULT_TO = ("both", "moving", "static")
#: Larger files are not session files.
MAX_BYTES = 1 << 16
#: Lists in lists in lists.
_MAX_DEPTH = 3
#: Seconds: to wait for the others, longest silence, between checkpoints.
TIMEOUTS = {"connect": 900.0, "silence": 300.0, "checkpoint": 30.0}
#: Most that a party may be asked for: GB of memory, and voxels of the largest image.
LIMITS = {"memory": 16.0, "voxels": 1 << 28}
_MOST = {"memory": 100_000, "voxels": 1 << 40}

_TOP = {"title", "operation", "reveal", "result_to"}
_TABLES = {"parties", "parameters", "timeouts", "limits"}


@dataclass(frozen=True)
class Party:
    """One party as the session file describes it.

    Attributes
    ----------
    pid : int
    name : str
        for people.
    fingerprint : str
        SHA-256 of its certificate.
    address : tuple of (str, int), or None
        where it can be dialled; None if it can only dial out.
    """

    pid: int
    name: str
    fingerprint: str
    address: tuple | None

    @property
    def title(self):
        """Role and name."""
        return f"the {ROLES[self.pid]} ({self.name})"

    @property
    def endpoint(self):
        """The address as text."""
        return "%s:%d" % self.address if self.address else "no address"


@dataclass(frozen=True)
class SessionFile:
    """A session file that was read and checked.

    Attributes
    ----------
    title : str
    operation : str
        what is computed; its parameters mean something to that operation only.
    reveal : str or None
    result_to : str
    parties : dict
        maps party numbers to `Party`.
    parameters : dict
    timeouts : dict
        seconds, by name.
    limits : dict
        of memory (GB) and voxels, by name.
    contents : dict
        the whole file, as compared with the other parties'.
    """

    title: str
    operation: str
    reveal: str | None
    result_to: str
    parties: dict
    parameters: dict
    timeouts: dict
    limits: dict
    contents: dict

    @classmethod
    def read(cls, path):
        """Read and check a session file.

        Raises
        ------
        SessionFileError
            naming the entry and the remedy.
        """
        try:
            with open(path, "rb") as stream:
                text = stream.read(MAX_BYTES + 1)
        except OSError as exc:
            raise SessionFileError(
                f"cannot read the session file {path}: {exc.strerror}; check its name"
            ) from None
        if len(text) > MAX_BYTES:
            raise SessionFileError(f"{path} is too large for a session file")
        text = _decoded(text, path)
        try:
            contents = tomllib.loads(text)
        except (ValueError, RecursionError) as exc:
            raise SessionFileError(
                f"{path} is not a TOML file: {exc}; dipy_ppir_session new writes one "
                "to start from"
            ) from None
        try:
            return cls.parse(contents)
        except SessionFileError as exc:
            raise SessionFileError(f"session file {Path(path).name}: {exc}") from None

    @classmethod
    def parse(cls, contents):
        """Check the contents of a session file; see `read`."""
        _check_keys(contents, _TOP | _TABLES, "the file")
        for name in _TABLES & set(contents):
            if not isinstance(contents[name], dict):
                raise SessionFileError(f"[{name}] must be a table")
        parties = _parties(contents.get("parties", {}))
        parameters = contents.get("parameters", {})
        for key, value in parameters.items():
            if not _plain(value):
                raise SessionFileError(
                    f"parameter {key!r:.100} must be a number, a text, true or false, "
                    "or a list of these"
                )
        reveal = _text(contents, "reveal") if "reveal" in contents else None
        result_to = _text(contents, "result_to", "both")
        if result_to not in RESULT_TO:
            raise SessionFileError(
                f"result_to = {result_to!r} is not known; choose one of "
                f"{', '.join(map(repr, RESULT_TO))}"
            )
        return cls(
            title=_text(contents, "title", "untitled session"),
            operation=_text(contents, "operation"),
            reveal=reveal,
            result_to=result_to,
            parties=parties,
            parameters=parameters,
            timeouts=_timeouts(contents.get("timeouts", {})),
            limits=_limits(contents.get("limits", {})),
            contents=_canonical(contents, parties),
        )

    @property
    def arguments(self):
        """Keyword arguments of the operation."""
        arguments = {**self.parameters, "result_to": self.result_to}
        if self.reveal is not None:
            arguments["reveal"] = self.reveal
        return arguments

    @property
    def digest(self):
        """SHA-256 of what the file says, whatever its comments and line ends."""
        text = json.dumps(self.contents, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def agreement(self):
        """The contents one by one, so that a difference can be named."""
        # The last in the alphabet: an entry that differs is named before the whole.
        return {**flatten(self.contents), "whole session file": self.digest}

    def party_of(self, fingerprint):
        """The party with this certificate.

        Raises
        ------
        SessionFileError
            if the file does not name it.
        """
        for party in self.parties.values():
            if party.fingerprint == fingerprint:
                return party
        raise SessionFileError(
            "the session file does not name this party's certificate, whose "
            f"fingerprint is {fingerprint}; put it into the table of this party, in "
            "everybody's copy, or choose another --identity"
        )

    def dials(self, pid):
        """Who dials whom: the parties that party `pid` connects to by itself.

        Owners dial the helper. Of the owners, the one without an address dials the
        other; with two addresses the moving owner dials. Without any, the owners meet
        at the helper's relay: see `relayed`.
        """
        if pid == HELPER:
            return []
        other = STATIC if pid == MOVING else MOVING
        mine, theirs = self.parties[pid].address, self.parties[other].address
        if theirs and (pid == MOVING or not mine):
            return [HELPER, other]
        return [HELPER]

    @property
    def relayed(self):
        """Whether the owners' traffic goes through the helper."""
        return not (self.parties[MOVING].address or self.parties[STATIC].address)


def _decoded(data, path):
    """The text of a file that should be UTF-8; editors on Windows write others."""
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    wide = wide or b"\0" in data[:2]
    with suppress(UnicodeDecodeError):
        if not wide:
            return data.decode("utf-8-sig")
    encoding = "UTF-16" if wide else "Latin-1 or Windows-1252"
    raise SessionFileError(
        f"{path} is not UTF-8 (it looks like {encoding}); open it in a text editor and "
        "save it with the encoding UTF-8"
    )


def flatten(contents, prefix=""):
    """Nested tables as one, with dotted keys."""
    flat = {}
    for key, value in contents.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def parse_address(text):
    """Host and port of ``host:port``; None if it is none."""
    match = re.fullmatch(
        r"(?:\[([0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|([^\s:/@\[\]]+)):(\d{1,5})", text
    )
    if not match or not 0 < int(match[3]) < 65536:
        return None
    try:
        if match[1]:
            ipaddress.IPv6Address(match[1].partition("%")[0])
        else:
            match[2].encode("idna")  # what looking up a name begins with
    except ValueError:
        return None
    return match[1] or match[2], int(match[3])


def _parties(tables):
    _check_keys(tables, set(TABLES), "[parties]")
    parties = {}
    for name, pid in TABLES.items():
        where = f"[parties.{name}]"
        table = tables.get(name)
        if not isinstance(table, dict):
            raise SessionFileError(f"{where} is missing; every party needs a table")
        _check_keys(table, {"name", "address", "fingerprint"}, where)
        given = _text(table, "fingerprint", where=where)
        pin = parse_fingerprint(given)
        if pin is None:
            raise SessionFileError(
                f"fingerprint in {where} is not a SHA-256 fingerprint (64 hexadecimal "
                "digits); dipy_ppir_keygen --show prints it"
            )
        address = None
        if "address" in table:
            address = parse_address(_text(table, "address", where=where))
            if address is None:
                raise SessionFileError(
                    f"address in {where} must be host:port, for example "
                    '"registration.hospital.org:7433"; leave it out for an owner that '
                    "can only dial out"
                )
        parties[pid] = Party(pid, _text(table, "name", where=where), pin, address)
    if parties[HELPER].address is None:
        raise SessionFileError(
            "[parties.helper] needs an address: the owners dial the helper"
        )
    pins = [p.fingerprint for p in parties.values()]
    names = [p.name for p in parties.values()]
    if len(set(pins)) < len(pins):
        raise SessionFileError(
            "two parties have the same fingerprint, but three separate parties are "
            "needed: whoever is two of them can rebuild both images"
        )
    if len(set(names)) < len(names):
        raise SessionFileError("two parties have the same name; tell them apart")
    addresses = [p.address for p in parties.values() if p.address]
    if len(set(addresses)) < len(addresses):
        raise SessionFileError("two parties have the same address; give each its own")
    return parties


def _canonical(contents, parties):
    """Contents that were checked, with fingerprints in one form: hashes agree."""
    tables = {
        name: {**contents["parties"][name], "fingerprint": parties[pid].fingerprint}
        for name, pid in TABLES.items()
    }
    return json.loads(json.dumps({**contents, "parties": tables}))


def _timeouts(table):
    _check_keys(table, set(TIMEOUTS), "[timeouts]")
    for key, value in table.items():
        least = 0 if key == "checkpoint" else 1
        number = type(value) in (int, float)
        if not number or not least <= value <= 7 * 24 * 3600:
            raise SessionFileError(
                f"{key} in [timeouts] must be seconds from {least} to a week"
            )
    return {**TIMEOUTS, **{key: float(value) for key, value in table.items()}}


def _limits(table):
    _check_keys(table, set(LIMITS), "[limits]")
    for key, value in table.items():
        number = type(value) is int or (key == "memory" and type(value) is float)
        if not number or not 0 < value <= _MOST[key]:
            kind = "GB, a number" if key == "memory" else "an integer"
            raise SessionFileError(
                f"{key} in [limits] must be {kind} above 0 and at most {_MOST[key]:,}"
            )
    return {**LIMITS, **table}


def _check_keys(table, known, where):
    strangers = sorted(set(table) - known)
    if strangers:
        raise SessionFileError(
            f"{where} has no entry {strangers[0]!r:.100}; it may have: "
            f"{', '.join(sorted(known))}"
        )


def _text(table, key, default=None, where="the file"):
    value = table.get(key, default)
    if value is None:
        raise SessionFileError(f"{where} lacks {key}")
    if not isinstance(value, str) or not value.isprintable() or len(value) > 200:
        raise SessionFileError(f"{key} in {where} must be a short text on one line")
    if not value.strip():
        raise SessionFileError(f"{key} in {where} is empty")
    return value.strip()


def _plain(value, depth=0):
    if isinstance(value, list):
        return (
            depth < _MAX_DEPTH
            and len(value) <= 64
            and all(_plain(v, depth + 1) for v in value)
        )
    if type(value) is int:
        return -(1 << 63) <= value < 1 << 63
    if type(value) is float:
        return math.isfinite(value)  # what is not a number does not equal itself
    return type(value) in (str, bool)
