"""The session file: what the parties agreed on before they connect.

A TOML file that all parties hold alike. It names the parties and pins their
certificates, and says what is computed, what may be revealed and who gets the result.
Which party this process is follows from its own certificate. There are three of them,
or two owners alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
import json
import math
import re
from typing import Any, Self

from dipy_ppir.mpc.agreedfile import (  # noqa: F401
    MAX_BYTES,
    AgreedFile,
    Party,
    check_distinct,
    check_keys,
    flatten,
    parameters_of_table,
    parse_address,
    party_of_table,
    text_of,
    timeouts_of,
)
from dipy_ppir.mpc.errors import SessionFileError
from dipy_ppir.mpc.identity import is_sealing_key
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC

#: Names of the parties' tables in the file.
TABLES = {"moving": MOVING, "static": STATIC, "helper": HELPER}
RESULT_TO = ("both", "moving", "static")
#: How the helper takes part: it meets the owners, deals before they meet, or is none.
HELPERS = ("online", "ahead", "none")
#: Seconds: to wait for the others, longest silence, between checkpoints.
TIMEOUTS = {"connect": 900.0, "silence": 300.0, "checkpoint": 30.0}
#: Most that a party may be asked for: GB of memory, and voxels of the largest image.
LIMITS = {"memory": 16.0, "voxels": 1 << 28}
_MOST = {"memory": 100_000, "voxels": 1 << 40}

#: Last place in a row of sessions.
MOST_PLACES = 999_999

_TOP = {"title", "operation", "reveal", "result_to", "place", "helper"}
_TABLES = {"parties", "parameters", "timeouts", "limits", "deal"}
#: What a helper that deals ahead is told of an owner, see `_deal`.
_TOLD = {"sealing", "shape", "grid2world"}


@dataclass(frozen=True)
class SessionFile(AgreedFile):
    """A session file that was read and checked.

    Attributes
    ----------
    title, parties, parameters, timeouts, contents
        see `AgreedFile`.
    operation : str
        what is computed; its parameters mean something to that operation only.
    reveal : str or None
    result_to : str
    limits : dict
        of memory (GB) and voxels, by name.
    place : int or None
        of this session in a row: several sessions that are held one after the other,
        in this order, at the same addresses, by parties of which each takes part in
        some. Who dials a party that is at another of them is told, and waits or gives
        this one up.
    helper : {"online", "ahead", "none"}
        how the helper takes part; with "none" two owners are alone, see `PairSession`,
        with "ahead" they meet when the helper has dealt, see `DealtSession`.
    deal : dict
        with "ahead": maps owners to what the helper must know of them, a dict:
        ``sealing``, the key to which its deal is sealed, and ``shape`` and, of an
        image, ``grid2world`` of what it will register.
    """

    kind, command = "session file", "dipy_ppir_session"

    operation: str
    reveal: str | None
    result_to: str
    limits: dict[str, float]
    place: int | None = None
    helper: str = HELPERS[0]
    deal: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def parse(cls, contents: Mapping[str, Any]) -> Self:
        """Check the contents of a session file; see `read`."""
        check_keys(contents, _TOP | _TABLES, "the file")
        for name in _TABLES & set(contents):
            if not isinstance(contents[name], dict):
                hint = '; of two owners alone the file says helper = "none"'
                raise SessionFileError(
                    f"[{name}] must be a table{hint if name == 'parties' else ''}"
                )
        helper = _one_of(HELPERS, contents, "helper")
        parties = _parties(contents.get("parties", {}), helper)
        parameters = parameters_of_table(contents.get("parameters", {}))
        reveal = text_of(contents, "reveal") if "reveal" in contents else None
        return cls(
            title=text_of(contents, "title", "untitled session"),
            operation=text_of(contents, "operation"),
            reveal=reveal,
            result_to=_one_of(RESULT_TO, contents, "result_to"),
            parties=parties,
            parameters=parameters,
            timeouts=timeouts_of(contents.get("timeouts", {}), TIMEOUTS),
            limits=_limits(contents.get("limits", {})),
            contents=_canonical(contents, parties),
            place=_place(contents.get("place")),
            helper=helper,
            deal=_deal(contents.get("deal"), helper),
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the operation."""
        arguments = {**self.parameters, "result_to": self.result_to}
        if self.reveal is not None:
            arguments["reveal"] = self.reveal
        return arguments

    def dials(self, pid: int) -> list[int]:
        """Who dials whom: the parties that party `pid` connects to by itself.

        Owners dial the helper, if it meets them. Of the owners, the one without an
        address dials the other; with two addresses the moving owner dials. Without any,
        the owners meet at the helper's relay: see `relayed`.
        """
        if pid == HELPER:
            return []
        other = STATIC if pid == MOVING else MOVING
        mine, theirs = self.parties[pid].address, self.parties[other].address
        dialled = [HELPER] if self.helper == "online" else []
        if theirs and (pid == MOVING or not mine):
            dialled.append(other)
        return dialled

    @property
    def relayed(self) -> bool:
        """Whether the owners' traffic goes through the helper."""
        addresses = [self.parties[p].address for p in (MOVING, STATIC)]
        return self.helper == "online" and not any(addresses)

    @property
    def alone(self) -> bool:
        """Whether the two owners are alone, without a helper."""
        return self.helper == "none"

    @property
    def present(self) -> dict[int, Party]:
        """The parties that meet."""
        if self.helper != "ahead":
            return self.parties
        return {p: party for p, party in self.parties.items() if p != HELPER}


def _one_of(known, contents, key):
    """One of some texts; the first is the default."""
    value = text_of(contents, key, known[0])
    if value not in known:
        raise SessionFileError(
            f"{key} = {value!r} is not known; choose one of "
            f"{', '.join(map(repr, known))}"
        )
    return value


def _parties(tables, helper):
    alone = helper == "none"
    check_keys(tables, set(TABLES), "[parties]")
    if alone and "helper" in tables:
        raise SessionFileError(
            '[parties.helper] is there, and helper = "none" says that the two owners '
            "are alone; take out the one or the other"
        )
    parties = {}
    for name, pid in TABLES.items():
        where = f"[parties.{name}]"
        table = tables.get(name)
        if alone and pid == HELPER:
            continue
        if not isinstance(table, dict):
            without = ""
            if pid == HELPER:
                without = ', or write helper = "none" above all tables for two owners '
                without += "alone"
            raise SessionFileError(
                f"{where} is missing; every party needs a table{without}"
            )
        parties[pid] = party_of_table(table, pid, where)
    _check_addresses(parties, helper)
    check_distinct(
        parties.values(),
        "but two separate owners are needed: whoever is both has both images"
        if alone
        else "but three separate parties are needed: whoever is two of them can "
        "rebuild both images",
    )
    return parties


def _check_addresses(parties, helper):
    """Refuse parties of which one cannot be reached."""
    if helper != "online":
        if not any(parties[p].address for p in (MOVING, STATIC)):
            raise SessionFileError(
                "neither owner has an address, and no helper is there to pass on "
                "what they send: give one of them an address that the other can dial; "
                "a port that is forwarded to it will do, as by ssh -R on a machine "
                "that both reach, which cannot read what passes"
            )
    elif parties[HELPER].address is None:
        raise SessionFileError(
            "[parties.helper] needs an address: the owners dial the helper"
        )


def _deal(tables, helper):
    """What a helper that deals ahead is told, by owner; see `SessionFile`."""
    if helper != "ahead":
        if tables is not None:
            raise SessionFileError(
                "[deal] is for a helper that deals before the owners meet: write "
                'helper = "ahead" above all tables, or take it out'
            )
        return {}
    check_keys(tables or {}, {"moving", "static"}, "[deal]")
    told = {}
    for name in ("moving", "static"):
        where, table = f"[deal.{name}]", (tables or {}).get(name)
        if not isinstance(table, dict):
            raise SessionFileError(
                f"{where} is missing, which a helper that deals ahead has to know; "
                f"dipy_ppir_session describe prints it, at the {name} owner"
            )
        check_keys(table, _TOLD, where)
        sealing = text_of(table, "sealing", where=where).lower()
        if not re.fullmatch("[0-9a-f]{64}", sealing):
            raise SessionFileError(
                f"sealing in {where} must be 64 hexadecimal digits; dipy_ppir_keygen "
                "--show prints them at that owner"
            )
        if not is_sealing_key(sealing):
            raise SessionFileError(
                f"sealing in {where} is no key; dipy_ppir_keygen --show prints it at "
                "that owner"
            )
        told[TABLES[name]] = {**table, "sealing": sealing}
        _check_grid(table, where)
    return told


def _check_grid(table, where):
    """Refuse a shape and a matrix that are none."""
    shape, matrix = table.get("shape"), table.get("grid2world")
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        raise SessionFileError(
            f"shape in {where} must be a list of sizes, for example [91, 109, 91], or "
            "of the number of points and of coordinates, for example [200, 3]"
        )
    if matrix is None:
        return
    rows = len(shape) + 1
    numbers = isinstance(matrix, list) and len(matrix) == rows
    numbers = numbers and all(
        isinstance(row, list) and len(row) == rows and all(map(_is_number, row))
        for row in matrix
    )
    if not numbers:
        raise SessionFileError(
            f"grid2world in {where} must be a matrix of {rows} by {rows} numbers"
        )


def _is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def _canonical(contents, parties):
    """Contents that were checked, with fingerprints in one form: hashes agree."""
    tables = {
        name: {**contents["parties"][name], "fingerprint": parties[pid].fingerprint}
        for name, pid in TABLES.items()
        if pid in parties
    }
    return json.loads(json.dumps({**contents, "parties": tables}))


def _place(value):
    if value is None or (type(value) is int and 1 <= value <= MOST_PLACES):
        return value
    raise SessionFileError(
        f"place must be an integer from 1 to {MOST_PLACES:,}; leave it out, unless the "
        "session is one of a row at the same addresses"
    )


def _limits(table):
    check_keys(table, set(LIMITS), "[limits]")
    for key, value in table.items():
        number = type(value) is int or (key == "memory" and type(value) is float)
        if not number or not 0 < value <= _MOST[key]:
            kind = "GB, a number" if key == "memory" else "an integer"
            raise SessionFileError(
                f"{key} in [limits] must be {kind} above 0 and at most {_MOST[key]:,}"
            )
    return {**LIMITS, **table}
