"""What was opened, to whom, and what it cost.

A protocol *declares* beside its code every value it may open: a label, the
receivers, the shape and the meaning. `Session.open` is the one function that
opens values; it asks the ledger first, and the ledger refuses labels that were
never declared and receivers that the declaration does not name.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dipy_ppir.mpc.errors import UndeclaredOpeningError

MOVING, STATIC, HELPER = 0, 1, 2
#: Party number to the name of its role.
ROLES = {MOVING: "moving owner", STATIC: "static owner", HELPER: "helper"}
#: More parties than any session has.
MOST_PARTIES = 32


@dataclass(frozen=True)
class Declaration:
    """One kind of value that a protocol may open.

    Parameters
    ----------
    label : str
        name of the value.
    receivers : tuple of int
        party numbers that may ever receive it.
    shape : str
        shape in terms of public parameters.
    meaning : str
        what the receiver learns, in words for people outside the field.
    bits : float
        most bits that a number can show: the logarithm of how many values it may have,
        less what is noise.
    """

    label: str
    receivers: tuple[int, ...]
    shape: str
    meaning: str
    bits: float


DECLARATIONS: dict[str, Declaration] = {}


def declare(
    label: str, receivers: Iterable[int], shape: str, meaning: str, bits: float
) -> Declaration:
    """Declare a value that a protocol may open; see `Declaration`."""
    declaration = Declaration(label, tuple(receivers), shape, meaning, float(bits))
    if DECLARATIONS.setdefault(label, declaration) != declaration:
        raise ValueError(f"{label!r} is already declared differently")
    return declaration


@dataclass
class _Opened:
    openings: int = 0
    values: int = 0
    bits: float = 0.0


@dataclass
class Ledger:
    """Openings and traffic of one run, as one party saw them.

    Attributes
    ----------
    opened : dict
        maps (receiver, label) to the count of openings, values and bits, all together.
    levels : dict
        maps (receiver, samples) to the count of numbers and of bits opened to the
        receiver about so many samples of the other image.
    voxels : dict
        maps a receiver to the number of voxels of the other image.
    sent : Counter
        payload bytes sent, by (phase, receiver).
    rounds : Counter
        messages waited for, by phase.
    attempt : dict
        as `opened`, without what was opened before the run was last resumed.
    resumed : int
        how many times the run was interrupted and resumed.
    run : Run or None
        the run's number and when it began, see `record`; None before.
    earlier_runs : list of str
        numbers of the runs that were interrupted and that this one goes on with.
    roles : dict
        party numbers to the names of their roles.
    """

    opened: dict[tuple[int, str], _Opened] = field(default_factory=dict)
    levels: dict[tuple[int, int], tuple[int, float]] = field(default_factory=dict)
    voxels: dict[int, int] = field(default_factory=dict)
    sent: Counter[tuple[str, int]] = field(default_factory=Counter)
    framing: int = 0
    rounds: Counter[str] = field(default_factory=Counter)
    attempt: dict[tuple[int, str], _Opened] = field(default_factory=dict)
    resumed: int = 0
    run: Any = None
    earlier_runs: list[str] = field(default_factory=list)
    roles: dict[int, str] = field(default_factory=lambda: ROLES)
    phase: str = "setup"
    _samples: int | None = None

    def record_opening(
        self, label: str, receivers: Iterable[int], values: int, bits: float
    ) -> None:
        """Enter an opening of `values` numbers of `bits` bits each, or refuse it.

        Who does not take part, as the helper of two owners alone, receives nothing.
        """
        receivers = [receiver for receiver in receivers if receiver in self.roles]
        if label not in DECLARATIONS:
            raise UndeclaredOpeningError(
                f"{label!r} was never declared, so it is not opened; "
                "declare it beside its protocol with dipy_ppir.mpc.ledger.declare"
            )
        strangers = set(receivers) - set(DECLARATIONS[label].receivers)
        if strangers:
            names = ", ".join(self.roles[p] for p in sorted(strangers))
            raise UndeclaredOpeningError(f"{label!r} may not be opened to: {names}")
        most = DECLARATIONS[label].bits
        if bits > most + 1e-9:
            raise UndeclaredOpeningError(
                f"{label!r} was declared with {most:g} bits a number, and is about to "
                f"be opened with {bits:g}"
            )
        for receiver in receivers:
            if self._samples is not None:
                self._add_level(receiver, self._samples, values, bits * values)
            for opened in (self.opened, self.attempt):
                entry = opened.setdefault((receiver, label), _Opened())
                entry.openings += 1
                entry.values += values
                entry.bits += bits * values

    def shown(self, receiver: int) -> float:
        """Bits opened to a receiver since the run was last resumed.

        As many as there is room for, see `ROOM`, whatever is counted.
        """
        return sum(
            max(entry.bits, entry.values * ROOM.get(label, 0))
            for (to, label), entry in self.attempt.items()
            if to == receiver
        )

    def _add_level(self, receiver, samples, numbers, bits):
        before = self.levels.get((receiver, samples), (0, 0.0))
        self.levels[receiver, samples] = before[0] + numbers, before[1] + bits

    def about_images(self, voxels: Mapping[int, int]) -> None:
        """How many voxels the image has about which a receiver learns something."""
        self.voxels.update(voxels)

    def about(self, samples: int | None) -> None:
        """What is opened from here on says something about so many samples, or None."""
        self._samples = samples

    def record_sent(self, peer: int, payload: int, framing: int) -> None:
        """Enter bytes sent to `peer` in the current phase."""
        self.sent[self.phase, peer] += payload
        self.framing += framing

    def record_round(self) -> None:
        """Enter one wait for messages of other parties."""
        self.rounds[self.phase] += 1

    def sent_by_phase(self) -> dict[str, int]:
        """Payload bytes sent, by phase."""
        totals: Counter[str] = Counter()
        for (phase, _), n in self.sent.items():
            totals[phase] += n
        return dict(totals)

    def state(self) -> dict[str, Any]:
        """Everything counted so far, JSON-able."""
        return {
            "opened": [
                [receiver, label, e.openings, e.values, e.bits]
                for (receiver, label), e in self.opened.items()
            ],
            "levels": [[*key, *n] for key, n in self.levels.items()],
            "sent": [[*key, n] for key, n in self.sent.items()],
            "rounds": [[key, n] for key, n in self.rounds.items()],
            "framing": self.framing,
            "resumed": self.resumed,
            "runs": [*self.earlier_runs, *([self.run.number] if self.run else [])],
        }

    def add(self, state: Mapping[str, Any]) -> None:
        """Count what an interrupted run had counted; see `state`."""
        for receiver, label, openings, values, bits in state["opened"]:
            entry = self.opened.setdefault((receiver, label), _Opened())
            entry.openings += openings
            entry.values += values
            entry.bits += bits
        for receiver, samples, numbers, bits in state["levels"]:
            self._add_level(receiver, samples, numbers, bits)
        for phase, peer, n in state["sent"]:
            self.sent[phase, peer] += n
        for phase, n in state["rounds"]:
            self.rounds[phase] += n
        self.framing += state["framing"]
        self.resumed += state["resumed"] + 1
        self.earlier_runs += state["runs"]

    def learned(self, *, attempt: bool = False) -> dict[str, list[dict[str, Any]]]:
        """What each role learned, for the receipt.

        Parameters
        ----------
        attempt : bool, optional
            leave out what was opened before the run was last resumed.

        Returns
        -------
        learned : dict
            maps each role's name to a list of dicts with the keys ``label``,
            ``meaning``, ``shape``, ``openings``, ``values`` and ``bits``, of all.
        """
        learned: dict[str, list[dict[str, Any]]] = {n: [] for n in self.roles.values()}
        opened = self.attempt if attempt else self.opened
        for (receiver, label), entry in opened.items():
            declaration = DECLARATIONS[label]
            learned[self.roles[receiver]].append(
                {
                    "label": label,
                    "meaning": declaration.meaning,
                    "shape": declaration.shape,
                    "openings": entry.openings,
                    "values": entry.values,
                    "bits": round(entry.bits, 1),
                }
            )
        return learned


#: What is opened under these labels determines most of the other image.
REBUILDS = {
    f"{kind}_{name}"
    for kind in ("update", "force", "bracket")
    for name in ("static", "moving")
}


#: Maps to few digits; what can be made of them is in doc/security.md.
MAPS = {"map", "level_static", "level_moving"}


#: What shows little because of what it is blurred by, where the program is followed.
BLURRED = {"moved_frame"}


#: Bits of a number that there is room for, whatever is counted where the program is
#: followed.
ROOM = {"moved_frame": 18, "step": 5}


#: What the moving owner is opened at transforms that it chooses.
CHOSEN = {"metric_gradient", "joint_histogram"}
