"""How much a plan opens about each image, and a plan in plain words."""

from dataclasses import replace

from dipy_ppir.align._public import planned_bits
from dipy_ppir.align.estimate import USUAL, estimate
from dipy_ppir.align.points import planned_bits as point_bits
from dipy_ppir.mpc.sessionfile import parse_address
from dipy_ppir.workflows.cohortplan import HELPER_NAME
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.openings import LIMIT, POINT_LIMIT
from dipy_ppir.workflows.operations import (
    explain_work,
    operation_of,
    sizes_text,
    usual_pairs,
)
from dipy_ppir.workflows.progress import duration_text, size_text

#: Lines of a list that are printed.
_MOST_LINES = 100


def bits_of_a_pair(plan):
    """Most bits that a pair opens about its moving and its static image.

    Parameters
    ----------
    plan : CohortPlan

    Returns
    -------
    bits : dict
        maps "moving" and "static" to a number; without those that are not limited.
    """
    session = plan.session(plan.pairs[0])
    parameters = operation_of(session)[1]
    if session.operation == "points":
        # What is about the points of one owner goes to the other.
        return {
            "moving": point_bits(parameters, 3, "static"),
            "static": point_bits(parameters, 3, "moving"),
        }
    if session.operation == "affine" and session.reveal == "transform":
        return {"static": planned_bits(parameters, 3)}
    return {}


def limit_of(plan):
    """Bits about an image that its owner's command accepts unless told otherwise."""
    return POINT_LIMIT if plan.shared["operation"] == "points" else LIMIT


def uses(plan):
    """In which pairs each image is.

    Parameters
    ----------
    plan : CohortPlan

    Returns
    -------
    uses : dict
        maps each `Image` to lists of `Pair`, by "moving" and "static".
    """
    found = {}
    for pair in plan.pairs:
        for part, image in pair.images.items():
            found.setdefault(image, {"moving": [], "static": []})[part].append(pair)
    return found


def check_bits(plan, site, limit=None):
    """Refuse a plan that opens more about an image of a site than it accepts.

    Parameters
    ----------
    plan : CohortPlan
    site : str
    limit : float, optional
        bits; 0 for none.

    Raises
    ------
    InputError
    """
    limit = limit_of(plan) if limit is None else limit
    each = bits_of_a_pair(plan)
    for image, parts in sorted(uses(plan).items()):
        total = sum(each.get(part, 0) * len(pairs) for part, pairs in parts.items())
        if image.site == site and 0 < limit < total:
            raise InputError(
                f"the plan may open {total:,.0f} bits about {image}, over the limit of "
                f"{limit:,.0f}. Ask yourself why so many registrations of one image "
                "are wanted, then raise the limit with --limit_bits, or have some of "
                "the pairs left out at all sites"
            )


def explain_cohort(plan):
    """A plan in plain words: who takes part and who will learn what.

    Parameters
    ----------
    plan : CohortPlan

    Returns
    -------
    text : str
    """
    lines = [plan.title, "=" * len(plan.title), ""]
    lines += _who(plan) if plan.sites else ["All images are on this machine.", ""]
    pairs = [f"    {pair.moving} to {pair.static}" for pair in plan.pairs]
    count = f"{len(pairs)} pair{'s'[: len(pairs) != 1]}"
    lines += ["Pairs", "-" * 5, f"{count}, {plan.concurrent} at a time:"]
    lines += [*_cut(pairs), ""]
    lines += explain_work(replace(plan, sites={}).session(plan.pairs[0]))
    lines += ["", *_in_all(plan)]
    lines += ["", "What is opened about each image", "-" * 31, *_about(plan), ""]
    lines.append(
        "What each party sends is what one pair takes, times the number of its pairs; "
        "the helper takes part in all."
    )
    lines.append(f"Hash of this plan: {plan.digest}; the same everywhere.")
    return "\n".join(lines)


def _in_all(plan):
    """What all pairs of a plan take, if all are as large as is usual."""
    parameters = operation_of(plan.session(plan.pairs[0]))[1]
    count, line = len(plan.pairs), USUAL if plan.sites else None
    # As many as the lane with most of them has.
    in_turn = -(-count // plan.concurrent)
    lines = ["What the whole cohort takes", "-" * 27]
    for static, moving, _ in usual_pairs(parameters):
        ahead = estimate(parameters, static, moving)
        seconds = ahead.seconds(line)
        times = dict.fromkeys(duration_text(n * seconds) for n in (in_turn, count))
        about = "at most about" if ahead.at_most else "about"
        lines += [
            f"All pairs of {sizes_text(parameters, static, moving)}:",
            f"    {about} {' to '.join(times)}, {size_text(count * ahead.sent)} of "
            "traffic in all.",
        ]
    if plan.concurrent > 1 and count > 1:
        lines.append(
            f"The shorter time is where {min(plan.concurrent, count)} pairs at a time "
            "take no longer than one; they share processors, memory and lines."
        )
    return lines


def _who(plan):
    lines = ["Who takes part", "-" * 14]
    for name, table in plan.sites.items():
        what = "is the helper" if name == HELPER_NAME else f"is {name}"
        lines.append(f"{table['name']} {what}, in {len(plan.pairs_of(name))} pairs.")
        lines.append(f"    certificate SHA-256 {table['fingerprint']}")
    lines += ["Compare every fingerprint with its owner by telephone.", ""]
    lines += ["Who can be dialled", "-" * 18]
    for table in plan.sites.values():
        if "address" not in table:
            lines.append(f"{table['name']} dials out only.")
            continue
        host, port = parse_address(table["address"])
        last = port + plan.concurrent - 1
        ports = f"port {port}" if last == port else f"ports {port} to {last}"
        lines.append(f"{table['name']} listens at {host}, {ports} (TCP).")
    lines.append(
        "Traffic of two sites that cannot be dialled goes through the helper, which "
        "cannot read it."
    )
    return [*lines, ""]


def _about(plan):
    each, limit, lines, over = bits_of_a_pair(plan), limit_of(plan), [], []
    for image, parts in sorted(uses(plan).items()):
        said = [f"{part} image of {len(p)}" for part, p in parts.items() if p]
        others = sorted(
            {i.site for p in sum(parts.values(), []) for i in p.images.values()}
            - {image.site}
        )
        total = sum(each.get(part, 0) * len(p) for part, p in parts.items())
        to = f", to {', '.join(others)}" if others else ""
        bits = f": at most {total:,.0f} bits in all{to}" if total else ""
        lines.append(f"    {image}, {' and '.join(said)}{bits}")
        over += [f"{image}"] if total > limit else []
    if not each:
        lines.append(
            "How many bits a pair opens depends on the size of the images; those of "
            "several pairs with the same image add up."
        )
    elif over:
        names = ", ".join(over[:5]) + (" and others" if len(over) > 5 else "")
        lines.append(
            f"CAUTION: over the {limit:,} bits about {names} that the owner's command "
            "accepts unless it is given --limit_bits."
        )
    return _cut(lines) if len(lines) <= _MOST_LINES else [*_cut(lines[:-1]), lines[-1]]


def _cut(lines):
    if len(lines) <= _MOST_LINES:
        return lines
    return [*lines[:_MOST_LINES], f"    and {len(lines) - _MOST_LINES} more"]
