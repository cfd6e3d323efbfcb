"""The receipt of a run: what each party learned, what it cost, and how that reads."""

from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
import math
import platform
from typing import Any

from dipy_ppir.mpc.fields import P127, R64, R128
from dipy_ppir.mpc.ledger import BLURRED, CHOSEN, MAPS, REBUILDS, Ledger
from dipy_ppir.mpc.record import source_digest

#: Packages whose versions are on the receipt, where they are installed.
PACKAGES = (
    "dipy",
    "mpyc",
    "numpy",
    "scipy",
    "nibabel",
    "cryptography",
    "pyopenssl",
    "gmpy2",
)


@cache
def _versions():
    # To look them up takes milliseconds, as long as a short run.
    versions = {"dipy_ppir": version("dipy-ppir")}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {**versions, "python": platform.python_version()}


def run_facts(threshold, parties):
    """Facts about the run and its software that every receipt states."""
    return {
        "m": parties,
        "t": threshold,
        "insecure": threshold == 0,
        "fields": f"{R64!r}, {R128!r}, {P127!r}",
        "versions": dict(_versions()),
        "source": source_digest(),
    }


def make_receipt(
    ledger: Ledger, sent_by_party: Mapping[str, Mapping[str, int]], **facts: Any
) -> dict[str, Any]:
    """The receipt of a run: what each party learned and what it cost.

    Parameters
    ----------
    ledger : Ledger
        ledger of the run.
    sent_by_party : dict
        maps each role's name to the payload bytes it sent, by phase.
    **facts
        whatever else belongs on the receipt: role, m, t, fields, versions, parameters;
        of a session between sites title, session_file and parties; of one for which
        the helper dealt ahead deal.

    Returns
    -------
    receipt : dict
        can be written as JSON.
    """
    run = ledger.run
    return {
        **dict.fromkeys(("title", "role", "date", "duration", "run", "earlier_runs")),
        **dict.fromkeys(("session_file", "deal", "parties")),
        **dict.fromkeys(("operation", "parameters", "images")),
        "warnings": [],
        "common": {},
        "signatures": {},
        **facts,
        "run": run and run.number,
        "date": run and run.date,
        "duration": run and run.duration,
        "earlier_runs": list(ledger.earlier_runs),
        "learned": ledger.learned(),
        "levels": [
            {
                "party": ledger.roles[receiver],
                "samples": samples,
                "numbers": numbers,
                "bits": round(bits, 1),
            }
            for (receiver, samples), (numbers, bits) in sorted(ledger.levels.items())
        ],
        "bits": {
            role: round(
                sum(e.bits for (r, _), e in ledger.opened.items() if r == receiver), 1
            )
            for receiver, role in ledger.roles.items()
        },
        "voxels": {ledger.roles[receiver]: n for receiver, n in ledger.voxels.items()},
        "bytes_sent": sent_by_party,
        "bytes_total": sum(sum(p.values()) for p in sent_by_party.values()),
        "waits": dict(ledger.rounds),
        "resumed": ledger.resumed,
        "last_attempt": ledger.learned(attempt=True) if ledger.resumed else None,
    }


#: What it rests on that two owners alone see no more than is opened to them.
ALONE = (
    "Two owners alone: no third party takes part, and none has to be trusted.",
    "What an owner is sent is encrypted with the other's key, or masked with random "
    "numbers of the other's. That hides it as long as ring learning with errors is "
    "hard, with parameters of 128 bits by the homomorphic encryption standard, and AES "
    "works as a hash; by chance something shows less than once in 2^40 registrations.",
    "Both owners follow the program (semi-honest): one that does not can spoil the "
    "result, chooses what the numbers that are opened to it are about, and where so "
    "many are opened as by SyN and free-form registration may read the other's whole "
    "image, which with a helper it cannot. The code is not audited.",
)
#: What it rests on besides where the helper dealt ahead.
DEALT = (
    "{helper} dealt before the owners met and received nothing. What it dealt for an "
    "owner is sealed to that owner's key; it kept no copy if it follows the program."
)
INSECURE = "INSECURE RUN: the threshold was 0, nothing was kept secret."
#: Above so many numbers per sample opened as histograms, the receipt says that the
#: samples may be worked out; see doc/security.md for the measured attack.
RISKY_SHARE = 0.1


def _numbers(n):
    return f"{n:,} number{'s' if n != 1 else ''}"


def _bits(n):
    return f"{n:,.0f} bit{'s' if n != 1 else ''}"


def _size(n):
    if n < 1000:
        return f"{n} B"
    power = min(int(math.log10(n) // 3), 4)
    return f"{n / 1000**power:.1f} {' kMGT'[power]}B"


def receipt_text(receipt: Mapping[str, Any]) -> str:
    """The receipt in plain words, for people who answer for the data.

    Parameters
    ----------
    receipt : dict
        as made by `make_receipt`.

    Returns
    -------
    text : str
    """
    sections = {
        f"Receipt of the {receipt['role']}": run_lines(receipt),
        "Warnings": receipt["warnings"],
        "What each party learned": learned_lines(receipt),
        "Result": result_lines(receipt),
        "Quality of the map": quality_lines(receipt),
        "What crossed the network": traffic_lines(receipt),
        "What this rests on": trust_lines(receipt),
    }
    text = sections_text(sections)
    if receipt.get("insecure"):
        text = f"{INSECURE}\n\n{text}"
    return text


def sections_text(sections):
    """Sections, those that say nothing left out: titles to lists of lines."""
    return "\n\n".join(
        "\n".join([title, "-" * len(title), *lines])
        for title, lines in sections.items()
        if lines
    )


def run_lines(receipt):
    """Which run it is of, and who took part."""
    if not receipt["run"]:
        return []
    lines = [receipt["title"]] if receipt["title"] else []
    began = receipt["date"].replace("T", " ").replace("Z", " UTC")
    lines.append(f"The run began {began} and took {receipt['duration']:,.1f} s.")
    lines.append(f"Number of the run: {receipt['run']}")
    for number in receipt["earlier_runs"]:
        lines.append(f"It went on with the interrupted run {number}.")
    if receipt["session_file"]:
        file = "plan" if _of_template(receipt) else "session file"
        lines.append(f"Hash of the {file}: {receipt['session_file']}")
    for role, party in (receipt["parties"] or {}).items():
        named = role == f"site {party['name']}"
        lines.append(
            f"The {role} " + ("took part." if named else f"was {party['name']}.")
        )
        lines.append(f"    certificate SHA-256 {party['fingerprint']}")
    lines += _dealt_lines(receipt)
    for name, grid in (receipt["images"] or {}).items():
        shape = " x ".join(map(str, grid["shape"]))
        size = " x ".join(f"{x:.3g}" for x in grid["voxel_size"])
        lines.append(f"The {name} image has {shape} voxels of {size} mm.")
    return lines


def _who_dealt(deal):
    return f"helper, {deal['helper']}," if "helper" in deal else "helper"


def _dealt_lines(receipt):
    """Who dealt ahead, and what."""
    deal = receipt.get("deal")
    if not deal:
        return []
    who = _who_dealt(deal)
    lines = [f"Before the owners met the {who} made deal {deal['number']}."]
    if "fingerprint" in deal:
        lines.append(f"    certificate SHA-256 {deal['fingerprint']}")
    return lines


def _of_points(receipt):
    return receipt["operation"] == "points"


def _of_template(receipt):
    return receipt["operation"] == "template"


def _center_of(receipt):
    if _of_points(receipt):
        return "centroid of the moving points"
    return "centre of the static image"


def result_lines(receipt):
    """What this party got, in words."""
    lines, found = [], receipt.get("transform")
    if found:
        shift = ", ".join(f"{x:.2f}" for x in found["shift"])
        axis = ""
        if found["axis"]:
            axis = f" about ({', '.join(f'{x:.2f}' for x in found['axis'])})"
        lines.append(
            f"The transform takes the {_center_of(receipt)} "
            f"{math.hypot(*found['shift']):.2f} mm away ({shift}), turns by "
            f"{found['turn']:.2f} degrees{axis}, and scales by "
            f"{', '.join(f'{x:.3f}' for x in found['scales'])}"
            + ("; it takes left for right." if found["mirrored"] else ".")
        )
    moved = receipt.get("displacement")
    if moved:
        lines.append(
            "Apart from the affine transform at its start, the map moves points by "
            f"{moved['mean']:.2f} mm on average, by up to {moved['percentile_95']:.2f} "
            f"mm in 95 % of the voxels, and by {moved['largest']:.2f} mm at most."
        )
    metric = receipt.get("metric")
    if metric:
        lines.append(f"The metric there: {metric['name']} {metric['value']:.6g}.")
    return lines


def quality_lines(receipt):
    """Whether a map folds."""
    quality = receipt.get("quality")
    if not quality:
        return []
    low, high = quality["smallest_jacobian"], quality["largest_jacobian"]
    return [
        f"{quality['non_positive_jacobian']:,} of {quality['voxels']:,} voxels "
        f"({quality['percent']:.3g} %) have a non-positive Jacobian determinant: "
        f"there the map folds. The determinant lies between {low:.3f} and {high:.3f}."
    ]


def learned_lines(receipt):
    """What was opened to whom, and what that can show."""
    return _opened_lines(receipt) + remark_lines(receipt)


def _opened_lines(receipt):
    """What was opened to whom, and how much that is."""
    lines = []
    for role, entries in receipt["learned"].items():
        if not entries:
            what, public = "image", "image shapes and positions"
            if _of_points(receipt):
                what, public = "set of points", "how many points there are"
            lines.append(
                f"The {role} learned nothing about either {what}. It saw only public "
                f"facts: {public}, parameters, number of steps."
            )
        for e in entries:
            times = "once" if e["openings"] == 1 else f"{e['openings']:,} times"
            lines.append(
                f"The {role} learned, {times}, {e['meaning']}: "
                f"{_numbers(e['values'])}, {_bits(e['bits'])} in all ({e['label']})."
            )
        voxels = receipt["voxels"].get(role)
        if entries and voxels:
            bits = receipt["bits"][role]
            lines.append(
                f"That is {bits:,.0f} bits about an image of {voxels:,} voxels, "
                f"{bits / voxels:.2g} for each."
            )
    return lines


def remark_lines(receipt):
    """What that can show."""
    lines = []
    if receipt.get("resumed"):
        times = receipt["resumed"]
        lines.append(
            f"The run was interrupted {'once' if times == 1 else f'{times} times'}. "
            "What was computed again is counted again; what was under way at an "
            "interruption may have been opened once more than counted."
        )
    lines += level_lines(receipt)
    labels = {e["label"] for v in receipt["learned"].values() for e in v}
    if "edge_samples" in labels:
        lines.append(
            "CAUTION: the static owner was shown where the moving image has edges, at "
            "every iteration (doc/security.md)."
        )
    if labels & REBUILDS:
        lines.append(
            "CAUTION: no image was sent, but an owner who sets out to can rebuild most "
            "of the other image from what was opened (doc/security.md)."
        )
    elif "control_point_steps" in labels:
        lines.append(
            "CAUTION: no image was sent, but the moving owner can rebuild much of the "
            "static image from the steps that it was shown (doc/security.md)."
        )
    elif _of_template(receipt):
        lines.append(
            "Nothing but these sums over all sites was shown to anybody, and in how "
            "long a site took, about how many images it has. The bits are the most "
            "that sums can be of. Each site can take its own part away, and what two "
            "runs with other images or sites differ by is the difference "
            "(doc/security.md)."
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
    elif _of_points(receipt) and "rotation" not in labels:
        lines.append(
            "No point was shown to anybody but its owner, and no transform: none was "
            "found, or none was this party's to know."
        )
    elif _of_points(receipt):
        lines.append(
            "No point was shown to anybody but its owner. Who gets the transform knows "
            "where the other's centroid is, which it takes its own to."
        )
    elif receipt["m"] == 2:
        lines.append(
            "No voxel of an image was shown to anybody but the image's owner, as long "
            "as both owners followed the program."
        )
    else:
        lines.append(
            "No voxel of an image was shown to anybody but the image's owner. An owner "
            "that does not follow the program may choose what the bits that it learns "
            "are about; it learns no more of them."
        )
    return lines


def level_lines(receipt):
    """What was opened about each resolution level, a caution after its level."""
    lines = []
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
    return lines


def traffic_lines(receipt):
    """What every party sent."""
    lines = []
    for role, phases in receipt["bytes_sent"].items():
        detail = ", ".join(f"{p} {_size(n)}" for p, n in phases.items() if n)
        lines.append(f"The {role} sent {_size(sum(phases.values()))} ({detail}).")
    if receipt.get("deal_bytes"):
        size = _size(receipt["deal_bytes"])
        lines.append(f"The {receipt['role']} read {size} that the helper had dealt.")
    made, public = "an image", "parameters, shapes and positions"
    shown = "a finished map or transform"
    if _of_template(receipt):
        shown, public = "a sum", "parameters"
    if _of_points(receipt):
        made, public = "points", "parameters and the number of points"
    hidden = "encrypted, or masked" if receipt["m"] == 2 else "masked"
    lines.append(
        f"In all {_size(receipt['bytes_total'])}. Everything made from {made} was "
        f"{hidden} with random numbers; {public} were not, nor "
        f"what is listed above as {shown}."
    )
    return lines


def trust_lines(receipt):
    """What has to be true for all this to be so."""
    if _of_template(receipt):
        return [
            f"{receipt['m']} sites, of which at least two do not tell the others what "
            f"they hold: {receipt['m'] - 1} that pool it know what the last one added.",
            "Every site follows the program (semi-honest): one that does not can spoil "
            "the template, or choose it, and so how images lie in the next sum. The "
            "code is not audited.",
        ]
    if receipt["m"] == 2:
        return [*ALONE]
    dealt = []
    if receipt.get("deal"):
        dealt = [DEALT.format(helper=f"The {_who_dealt(receipt['deal'])}")]
    return [
        *dealt,
        f"{receipt['m']} parties, of which no {receipt['t'] + 1} work together: two "
        "parties that pool what they hold can rebuild both "
        f"{'sets of points' if _of_points(receipt) else 'images'}.",
        "Every party follows the program (semi-honest). The code is not audited.",
    ]
