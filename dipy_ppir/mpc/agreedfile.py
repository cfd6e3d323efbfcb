"""A file that separate parties hold alike, and agreed on before they connect.

A TOML file that names the parties and pins their certificates. Which party this process
is follows from its own certificate. What else is in it differs: see `SessionFile` and
`PlanFile`.
"""

import codecs
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
import hashlib
import ipaddress
import json
import math
from os import PathLike
from pathlib import Path
import re
import tomllib
from typing import Any, ClassVar, Self

from dipy_ppir.mpc.errors import SessionFileError
from dipy_ppir.mpc.identity import parse_fingerprint
from dipy_ppir.mpc.ledger import ROLES

#: Larger files are no files of this kind.
MAX_BYTES = 1 << 16
#: Lists in lists in lists.
_MAX_DEPTH = 3


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
    address: tuple[str, int] | None

    @property
    def role(self) -> str:
        """What it is called without its name."""
        return ROLES[self.pid]

    @property
    def title(self) -> str:
        """Role and name."""
        return f"the {self.role} ({self.name})"

    @property
    def endpoint(self) -> str:
        """The address as text."""
        return "%s:%d" % self.address if self.address else "no address"


@dataclass(frozen=True)
class AgreedFile:
    """A file that was read and checked.

    Attributes
    ----------
    title : str
    parties : dict
        maps party numbers to `Party`.
    parameters : dict
    timeouts : dict
        seconds, by name.
    contents : dict
        the whole file, as compared with the other parties'.
    kind, command : str
        what it is called, and the command that writes one to start from.
    """

    kind: ClassVar[str]
    command: ClassVar[str]

    title: str
    parties: dict[int, Party]
    parameters: dict[str, Any]
    timeouts: dict[str, float]
    contents: dict[str, Any]

    @classmethod
    def read(cls, path: str | PathLike[str]) -> Self:
        """Read and check a file.

        Raises
        ------
        SessionFileError
            naming the entry and the remedy.
        """
        contents = read_toml(path, cls.kind, f"{cls.command} new")
        try:
            return cls.parse(contents)
        except SessionFileError as exc:
            raise SessionFileError(f"{cls.kind} {Path(path).name}: {exc}") from None

    @classmethod
    def parse(cls, contents: Mapping[str, Any]) -> Self:
        """Check the contents of a file; see `read`."""
        raise NotImplementedError

    @property
    def digest(self) -> str:
        """SHA-256 of what the file says, whatever its comments and line ends."""
        text = json.dumps(self.contents, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def present(self) -> dict[int, Party]:
        """The parties that meet: all of them."""
        return self.parties

    def agreement(self) -> dict[str, Any]:
        """The contents one by one, so that a difference can be named."""
        # The last in the alphabet: an entry that differs is named before the whole.
        return {**flatten(self.contents), f"whole {self.kind}": self.digest}

    def party_of(self, fingerprint: str) -> Party:
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
            f"the {self.kind} does not name this party's certificate, whose "
            f"fingerprint is {fingerprint}; put it into the table of this party, in "
            "everybody's copy, or choose another --identity"
        )


def read_toml(path, what, template, most=MAX_BYTES):
    """Contents of a TOML file.

    Parameters
    ----------
    path : str or Path
    what : str
        what the file is called in messages.
    template : str
        command that writes one to start from.
    most : int, optional
        bytes.

    Raises
    ------
    SessionFileError
        if it cannot be read, is too large, or no TOML.
    """
    try:
        with open(path, "rb") as stream:
            text = stream.read(most + 1)
    except OSError as exc:
        raise SessionFileError(
            f"cannot read the {what} {path}: {exc.strerror}; check its name"
        ) from None
    if len(text) > most:
        raise SessionFileError(f"{path} is too large for a {what}")
    text = _decoded(text, path)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as exc:
        twice = "overwrite" in str(exc)
        how = " (it is there twice, or as a value and as a table)" if twice else ""
        raise SessionFileError(
            f"{path} is not a TOML file: {exc}{how}; {template} writes one to start "
            "from"
        ) from None


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


def party_of_table(table, pid, where, kind=Party):
    """The party that a table describes; ``address`` may be left out.

    Raises
    ------
    SessionFileError
        naming the entry and the remedy.
    """
    check_keys(table, {"name", "address", "fingerprint"}, where)
    pin = parse_fingerprint(text_of(table, "fingerprint", where=where))
    if pin is None:
        raise SessionFileError(
            f"fingerprint in {where} is not a SHA-256 fingerprint (64 hexadecimal "
            "digits); dipy_ppir_keygen --show prints it"
        )
    address = None
    if "address" in table:
        address = parse_address(text_of(table, "address", where=where))
        if address is None:
            raise SessionFileError(
                f"address in {where} must be host:port, for example "
                '"registration.hospital.org:7433"; leave it out for a party that can '
                "only dial out"
            )
    return kind(pid, text_of(table, "name", where=where), pin, address)


def check_distinct(parties, why):
    """Refuse two parties with one certificate, name or address.

    Parameters
    ----------
    parties : sequence of Party
    why : str
        what would come of one party that is two.
    """
    for what, values, remedy in (
        ("fingerprint", [p.fingerprint for p in parties], why),
        ("name", [p.name for p in parties], "tell them apart"),
        ("address", [p.address for p in parties if p.address], "give each its own"),
    ):
        if len(set(values)) < len(values):
            raise SessionFileError(f"two parties have the same {what}; {remedy}")


def parameters_of_table(table):
    """The parameters of a file, if they are of a kind that can be compared."""
    for key, value in table.items():
        if not is_plain(value):
            raise SessionFileError(
                f"parameter {key!r:.100} must be a number, a text, true or false, or "
                "a list of these"
            )
    return table


def timeouts_of(table, defaults):
    """Seconds by name: those of a table, and by default those of another."""
    check_keys(table, set(defaults), "[timeouts]")
    for key, value in table.items():
        least = 0 if key == "checkpoint" else 1
        number = type(value) in (int, float)
        if not number or not least <= value <= 7 * 24 * 3600:
            raise SessionFileError(
                f"{key} in [timeouts] must be seconds from {least} to a week"
            )
    return {**defaults, **{key: float(value) for key, value in table.items()}}


def check_keys(table, known, where):
    """Refuse entries that nobody knows."""
    strangers = sorted(set(table) - known)
    if strangers:
        raise SessionFileError(
            f"{where} has no entry {strangers[0]!r:.100}; it may have: "
            f"{', '.join(sorted(known))}"
        )


def text_of(table, key, default=None, where="the file"):
    """A short text out of a table."""
    value = table.get(key, default)
    if value is None:
        raise SessionFileError(f"{where} lacks {key}")
    if not isinstance(value, str) or not value.isprintable() or len(value) > 200:
        raise SessionFileError(f"{key} in {where} must be a short text on one line")
    if not value.strip():
        raise SessionFileError(f"{key} in {where} is empty")
    return value.strip()


def is_plain(value, depth=0):
    """Whether a value is a number, a text, a truth, or a list of these."""
    if isinstance(value, list):
        return (
            depth < _MAX_DEPTH
            and len(value) <= 64
            and all(is_plain(v, depth + 1) for v in value)
        )
    if type(value) is int:
        return -(1 << 63) <= value < 1 << 63
    if type(value) is float:
        return math.isfinite(value)  # what is not a number does not equal itself
    return type(value) in (str, bool)
