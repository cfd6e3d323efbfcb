"""What was opened, to whom, and what it cost.

A protocol *declares* beside its code every value it may open: a label, the
receivers, the shape and the meaning. `Session.open` is the one function that
opens values; it asks the ledger first, and the ledger refuses labels that were
never declared and receivers that the declaration does not name. The receipt of
a run is made from the ledger alone.
"""

from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
import math
import platform

from dipy_ppir.mpc.errors import UndeclaredOpeningError
from dipy_ppir.mpc.fields import P127, R64, R128

MOVING, STATIC, HELPER = 0, 1, 2
#: Party number to the name of its role.
ROLES = {MOVING: "moving owner", STATIC: "static owner", HELPER: "helper"}


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
    receivers: tuple
    shape: str
    meaning: str
    bits: float


DECLARATIONS = {}


def declare(label, receivers, shape, meaning, bits):
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
    resumed : int
        how many times the run was interrupted and resumed.
    """

    opened: dict = field(default_factory=dict)
    levels: dict = field(default_factory=dict)
    voxels: dict = field(default_factory=dict)
    sent: Counter = field(default_factory=Counter)
    framing: int = 0
    rounds: Counter = field(default_factory=Counter)
    resumed: int = 0
    phase: str = "setup"
    _samples: int = None

    def record_opening(self, label, receivers, values, bits):
        """Enter an opening of `values` numbers of `bits` bits each, or refuse it."""
        if label not in DECLARATIONS:
            raise UndeclaredOpeningError(
                f"{label!r} was never declared, so it is not opened; "
                "declare it beside its protocol with dipy_ppir.mpc.ledger.declare"
            )
        strangers = set(receivers) - set(DECLARATIONS[label].receivers)
        if strangers:
            names = ", ".join(ROLES[p] for p in sorted(strangers))
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
            entry = self.opened.setdefault((receiver, label), _Opened())
            entry.openings += 1
            entry.values += values
            entry.bits += bits * values

    def _add_level(self, receiver, samples, numbers, bits):
        before = self.levels.get((receiver, samples), (0, 0.0))
        self.levels[receiver, samples] = before[0] + numbers, before[1] + bits

    def about_images(self, voxels):
        """How many voxels the image has about which a receiver learns something."""
        self.voxels.update(voxels)

    def about(self, samples):
        """What is opened from here on says something about so many samples, or None."""
        self._samples = samples

    def record_sent(self, peer, payload, framing):
        """Enter bytes sent to `peer` in the current phase."""
        self.sent[self.phase, peer] += payload
        self.framing += framing

    def record_round(self):
        """Enter one wait for messages of other parties."""
        self.rounds[self.phase] += 1

    def sent_by_phase(self):
        """Payload bytes sent, by phase."""
        totals = Counter()
        for (phase, _), n in self.sent.items():
            totals[phase] += n
        return dict(totals)

    def state(self):
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
        }

    def add(self, state):
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

    def learned(self):
        """What each role learned, for the receipt.

        Returns
        -------
        learned : dict
            maps each role's name to a list of dicts with the keys ``label``,
            ``meaning``, ``shape``, ``openings``, ``values`` and ``bits``, of all.
        """
        learned = {name: [] for name in ROLES.values()}
        for (receiver, label), entry in self.opened.items():
            declaration = DECLARATIONS[label]
            learned[ROLES[receiver]].append(
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


def run_facts(threshold):
    """Facts about the run and its software that every receipt states."""
    return {
        "m": len(ROLES),
        "t": threshold,
        "insecure": threshold == 0,
        "fields": f"{R64!r}, {R128!r}, {P127!r}",
        "versions": {
            "dipy_ppir": version("dipy-ppir"),
            **{name: version(name) for name in ("dipy", "mpyc", "numpy")},
            "python": platform.python_version(),
        },
    }


def make_receipt(ledger, sent_by_party, **facts):
    """The receipt of a run: what each party learned and what it cost.

    Parameters
    ----------
    ledger : Ledger
        ledger of the run.
    sent_by_party : dict
        maps each role's name to the payload bytes it sent, by phase.
    **facts
        whatever else belongs on the receipt: m, t, field, versions, parameters.

    Returns
    -------
    receipt : dict
        can be written as JSON.
    """
    return {
        **facts,
        "learned": ledger.learned(),
        "levels": [
            {
                "party": ROLES[receiver],
                "samples": samples,
                "numbers": numbers,
                "bits": round(bits, 1),
            }
            for (receiver, samples), (numbers, bits) in sorted(ledger.levels.items())
        ],
        "bits": {
            ROLES[receiver]: round(
                sum(e.bits for (r, _), e in ledger.opened.items() if r == receiver), 1
            )
            for receiver in ROLES
        },
        "voxels": {ROLES[receiver]: n for receiver, n in ledger.voxels.items()},
        "bytes_sent": sent_by_party,
        "bytes_total": sum(sum(p.values()) for p in sent_by_party.values()),
        "waits": dict(ledger.rounds),
        "resumed": ledger.resumed,
    }


#: Above so many numbers per sample opened as histograms, the receipt says that the
#: samples may be worked out; see doc/security.md for the measured attack.
RISKY_SHARE = 0.1


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


#: What the moving owner is opened at transforms that it chooses.
CHOSEN = {"metric_gradient", "joint_histogram"}


def _numbers(n):
    return f"{n:,} number{'s' if n != 1 else ''}"


def _size(n):
    if n < 1000:
        return f"{n} B"
    power = min(int(math.log10(n) // 3), 4)
    return f"{n / 1000**power:.1f} {' kMGT'[power]}B"


def receipt_text(receipt):
    """The receipt in plain words, for people who answer for the data.

    Parameters
    ----------
    receipt : dict
        as made by `make_receipt`.

    Returns
    -------
    text : str
    """
    lines = ["What each party learned", "-----------------------"]
    for role, entries in receipt["learned"].items():
        if not entries:
            lines.append(
                f"The {role} learned nothing about either image. It saw only public "
                "facts: image shapes and positions, parameters, number of steps."
            )
        for e in entries:
            times = "once" if e["openings"] == 1 else f"{e['openings']:,} times"
            lines.append(
                f"The {role} learned, {times}, {e['meaning']}: "
                f"{_numbers(e['values'])}, {e['bits']:,.0f} bits in all ({e['label']})."
            )
        voxels = receipt["voxels"].get(role)
        if entries and voxels:
            bits = receipt["bits"][role]
            lines.append(
                f"That is {bits:,.0f} bits about an image of {voxels:,} voxels, "
                f"{bits / voxels:.2g} for each."
            )
    if receipt.get("resumed"):
        times = receipt["resumed"]
        lines.append(
            f"The run was interrupted {'once' if times == 1 else f'{times} times'}. "
            "What was computed again is counted again; what was under way at an "
            "interruption may have been opened once more than counted."
        )
    exact = any(
        e["label"] == "joint_histogram" for v in receipt["learned"].values() for e in v
    )
    for level in receipt["levels"]:
        samples, numbers = level["samples"], level["numbers"]
        lines.append(
            f"About {samples:,} samples of the other image (one resolution level) "
            f"the {level['party']} learned {_numbers(numbers)} of "
            f"{level['bits']:,.0f} bits in all, "
            f"{100 * numbers / samples:.2g} numbers for every hundred samples."
        )
        if exact and numbers > RISKY_SHARE * samples:
            lines.append(
                "   CAUTION: so many histograms can determine these samples. "
                'reveal="transform" opens no histogram; larger levels hide more.'
            )
        elif numbers > samples / 2:
            lines.append(
                "   CAUTION: many numbers about few samples. Fewer iterations at this "
                "level, or leaving it out, opens less."
            )
    labels = {e["label"] for v in receipt["learned"].values() for e in v}
    if labels & REBUILDS:
        lines.append(
            "CAUTION: no image was sent, but an owner who sets out to can rebuild most "
            "of the other image from what was opened (doc/security.md)."
        )
    elif labels & MAPS:
        lines.append(
            "No voxel of an image was shown to anybody but the image's owner. What can "
            "be made of maps to so few digits is in doc/security.md."
        )
    elif labels & CHOSEN:
        lines.append(
            "No voxel of an image was shown to anybody but the image's owner, as long "
            "as the moving owner chose its transforms as the program does."
        )
    elif labels & BLURRED:
        lines.append(
            "No voxel of an image was shown to anybody but the image's owner. The bits "
            "of blurred numbers are the most that they show where all parties follow "
            "the program; an owner that does not can be shown more (doc/security.md)."
        )
    else:
        lines.append(
            "No voxel of an image was shown to anybody but the image's owner. An owner "
            "that does not follow the program may choose what the bits that it learns "
            "are about; it learns no more of them."
        )
    quality = receipt.get("quality")
    if quality:
        low, high = quality["smallest_jacobian"], quality["largest_jacobian"]
        lines += [
            "",
            "Quality of the map",
            "------------------",
            f"{quality['non_positive_jacobian']:,} of {quality['voxels']:,} voxels "
            f"({quality['percent']:.3g} %) have a non-positive Jacobian determinant: "
            "there the map folds. The determinant lies between "
            f"{low:.3f} and {high:.3f}.",
        ]
    lines += ["", "What crossed the network", "------------------------"]
    for role, phases in receipt["bytes_sent"].items():
        detail = ", ".join(f"{p} {_size(n)}" for p, n in phases.items() if n)
        lines.append(f"The {role} sent {_size(sum(phases.values()))} ({detail}).")
    lines.append(
        f"In all {_size(receipt['bytes_total'])}. Everything made from an image was "
        "masked with random numbers; parameters, shapes and positions were not, nor "
        "what is listed above as a finished map or transform."
    )
    lines += [
        "",
        "What this rests on",
        "------------------",
        f"{receipt['m']} parties, of which no {receipt['t'] + 1} work together: two "
        "parties that pool what they hold can rebuild both images.",
        "Every party follows the program (semi-honest). The code is not audited.",
    ]
    if receipt.get("insecure"):
        lines.insert(0, "INSECURE RUN: the threshold was 0, nothing was kept secret.\n")
    return "\n".join(lines)
