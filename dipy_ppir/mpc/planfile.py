"""The plan: what sites agreed on that add up what they have.

A TOML file as a session file is, but with a list of sites, three or more, none of which
is anything special::

    title = "T1 template, study 1"
    operation = "template"
    [[sites]]
    name = "Hospital A"
    fingerprint = "..."
    address = "template.hospital-a.example:7433"
"""

from collections.abc import Mapping
from dataclasses import dataclass
import json
from typing import Any, Self

from dipy_ppir.mpc.agreedfile import (
    AgreedFile,
    Party,
    check_distinct,
    check_keys,
    parameters_of_table,
    party_of_table,
    text_of,
    timeouts_of,
)
from dipy_ppir.mpc.errors import SessionFileError
from dipy_ppir.mpc.ledger import MOST_PARTIES

#: Fewer sites have no secrets: of two, each could subtract its own part from the sum.
LEAST_SITES = 3
#: Seconds: to wait for the others, longest silence. Between two sums every site works
#: for itself, for hours if it has many images. A site that ends, or whose machine does,
#: is noticed within minutes all the same: see `tls`.
TIMEOUTS = {"connect": 900.0, "silence": 24 * 3600.0}


class PlanSite(Party):
    """One site of a plan; see `Party`."""

    @property
    def role(self) -> str:
        """What it is called on receipts."""
        return f"site {self.name}"

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"the {self.role}"


@dataclass(frozen=True)
class PlanFile(AgreedFile):
    """A plan that was read and checked; see `AgreedFile`.

    Attributes
    ----------
    operation : str
        what is computed from the sums.
    """

    kind, command = "plan", "dipy_ppir_template"
    #: Every pair of sites is connected, by itself, and once.
    relayed, place = False, None

    operation: str

    @classmethod
    def parse(cls, contents: Mapping[str, Any]) -> Self:
        """Check the contents of a plan; see `read`."""
        tables = {"parameters", "timeouts"}
        check_keys(contents, {"title", "operation", "sites"} | tables, "the file")
        for name in tables & set(contents):
            if not isinstance(contents[name], dict):
                raise SessionFileError(f"[{name}] must be a table")
        parties = _sites(contents.get("sites", []))
        plain = [
            {**table, "fingerprint": parties[pid].fingerprint}
            for pid, table in enumerate(contents["sites"])
        ]
        return cls(
            title=text_of(contents, "title", "untitled"),
            operation=text_of(contents, "operation"),
            parties=parties,
            parameters=parameters_of_table(contents.get("parameters", {})),
            timeouts=timeouts_of(contents.get("timeouts", {}), TIMEOUTS),
            contents=json.loads(json.dumps({**contents, "sites": plain})),
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the operation."""
        return dict(self.parameters)

    def agreement(self) -> dict[str, Any]:
        """The contents one by one, so that a difference can be named."""
        flat = super().agreement()
        for pid, table in enumerate(flat.pop("sites"), 1):
            flat |= {f"site {pid}, {key}": value for key, value in table.items()}
        return flat

    def dials(self, pid: int) -> list[int]:
        """Who dials whom: the parties that party `pid` connects to by itself.

        Those before it in the list; the one without an address, all others.
        """
        if self.parties[pid].address is None:
            return [p for p in self.parties if p != pid]
        return [p for p in self.parties if p < pid and self.parties[p].address]


def _sites(tables):
    if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
        raise SessionFileError("every site needs a table, which begins with [[sites]]")
    if len(tables) < LEAST_SITES:
        raise SessionFileError(
            f"{len(tables)} sites are too few: of two, each could subtract its own "
            f"part from the sum; {LEAST_SITES} or more are needed, a [[sites]] for each"
        )
    if len(tables) > MOST_PARTIES:
        raise SessionFileError(
            f"{len(tables)} sites are too many; at most {MOST_PARTIES} can take part"
        )
    parties = {
        pid: party_of_table(table, pid, f"[[sites]] number {pid + 1}", PlanSite)
        for pid, table in enumerate(tables)
    }
    check_distinct(
        parties.values(),
        "but whoever is two of them adds the less to what hides the others",
    )
    hidden = [party.name for party in parties.values() if party.address is None]
    if len(hidden) > 1:
        raise SessionFileError(
            f"{' and '.join(hidden)} have no address, so that neither can dial the "
            "other; give all but one of them an address"
        )
    return parties
