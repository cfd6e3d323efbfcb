"""The receipt of a run: what each party learned, what it cost, and how that reads."""

from importlib.metadata import version
import math
import platform

from dipy_ppir.mpc.fields import P127, R64, R128
from dipy_ppir.mpc.ledger import BLURRED, CHOSEN, MAPS, REBUILDS, ROLES


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
