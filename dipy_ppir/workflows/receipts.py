"""The command ``dipy_ppir_receipt``: whether receipts belong together, in words."""

import argparse
from collections import Counter
from pathlib import Path
import sys

from dipy_ppir.align import plausibility
from dipy_ppir.mpc.identity import signed_by
from dipy_ppir.mpc.ledger import HELPER, ROLES
from dipy_ppir.mpc.receipt import (
    INSECURE,
    learned_lines,
    quality_lines,
    result_lines,
    run_lines,
    sections_text,
    traffic_lines,
)
from dipy_ppir.mpc.record import (
    common_digest,
    common_part,
    file_hash,
    statement,
)
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.operations import title_of
from dipy_ppir.workflows.outputs import OutputFiles
from dipy_ppir.workflows.receiptfile import (
    in_own_words,
    load,
    printable,
    roles_of,
    without_own,
)
from dipy_ppir.workflows.remote import write_receipt
from dipy_ppir.workflows.streams import be_quiet, is_quiet, say

#: Differences that are named; one change may make many.
_MOST_NAMED = 20


def receipt_parser():
    """The arguments of ``dipy_ppir_receipt``."""
    parser = argparse.ArgumentParser(
        prog="dipy_ppir_receipt",
        description="Check that receipts are of one run and say the same, and print "
        "in plain words what they say: who took part, what was computed, and what each "
        "party learned. The exit status is 0 if they are consistent, 1 otherwise.",
    )
    parser.add_argument(
        "receipts",
        nargs="+",
        metavar="FILE",
        help="receipts of one run (JSON): of one party, of some, or of all",
    )
    parser.add_argument(
        "--files",
        nargs="+",
        default=[],
        metavar="FILE",
        help="this site's own files (image, mask, prealign matrix): check that the run "
        "was about these",
    )
    parser.add_argument(
        "--to_send",
        metavar="FILE",
        help="also write a copy of one receipt without what is this site's own: the "
        "result in numbers, warnings, and hashes of files",
    )
    parser.add_argument(
        "--quiet",
        action="store_true",
        help="Print nothing, but what is wrong: one line for each problem.",
    )
    parser.add_argument(
        "--debug", action="store_true", help="on an error show where it occurred"
    )
    return parser


def receipt(arguments=None):
    """``dipy_ppir_receipt``: check receipts of one run, and print what they say.

    Returns
    -------
    status : int
        0 if they are consistent, 1 otherwise.
    """
    given = receipt_parser().parse_args(arguments)
    be_quiet(given.quiet)
    if len(set(given.receipts)) < len(given.receipts):
        raise InputError("the same receipt was given twice; give one of each party")
    if given.to_send and len(given.receipts) > 1:
        raise InputError("--to_send writes a copy of one receipt; give one")
    receipts = {
        printable(path, 1000): load(path, templates=True) for path in given.receipts
    }
    most = max(len(roles_of(found)) for found in receipts.values())
    if len(receipts) > most:
        raise InputError(
            f"{len(receipts)} receipts were given, but a run has one for each of its "
            f"{_number(most)} parties; give those of one run"
        )
    problems = check(receipts)
    found, strangers = check_files(receipts, given.files)
    problems += strangers
    if given.to_send and Path(given.to_send).exists():
        raise InputError(f"--to_send {given.to_send} is there already; name another")
    if given.to_send:
        (own,) = receipts.values()
        with OutputFiles([given.to_send], given.receipts) as out:
            write_receipt(out, given.to_send, without_own(own))
            out.commit()
    say(report(receipts, found, problems))
    if is_quiet():
        for problem in problems:
            print(problem, file=sys.stderr)
    return 1 if problems else 0


# -- checking ----------------------------------------------------------------


def check(receipts):
    """What is wrong with receipts that should be of one run.

    Parameters
    ----------
    receipts : dict
        maps names of files to what `load` returned.

    Returns
    -------
    problems : list of str
    """
    problems = []
    for name, found in receipts.items():
        problems += _check_one(name, found)
    by_role = Counter(found["role"] for found in receipts.values())
    for role, count in by_role.items():
        if count > 1:
            names = " and ".join(n for n, f in receipts.items() if f["role"] == role)
            problems.append(f"{names} are both the {role}'s: give one of each party.")
    runs = {found["run"]: name for name, found in receipts.items()}
    if len(runs) > 1:
        named = ", ".join(f"{name} of run {run[:16]}..." for run, name in runs.items())
        return [*problems, f"They are of different runs: {named}."]
    return problems + _differences(receipts)


def _check_one(name, found):
    """What is wrong with a receipt by itself."""
    problems, digest = [], common_digest(found)
    roles = dict(enumerate(roles_of(found)))
    if found["common"][found["role"]] != digest:
        problems.append(
            f"{name} was changed after the run: what it states does not have the "
            "digest that it records. Ask its owner for the file as it was written."
        )
    for role, opened in found["learned"].items():
        total = sum(e["bits"] for e in opened)
        if abs(total - found["bits"][role]) > 0.1 * (len(opened) + 1):
            problems.append(f"The bits of the {role} do not add up in {name}.")
    if not _is_part(found):
        problems.append(
            f"In {name} what was opened since an interruption is not part of the whole."
        )
    for role in roles.values():
        if found["common"][role] != found["common"][found["role"]]:
            problems.append(
                f"By {name} the {role} recorded something else when the run ended: "
                "compare with its receipt."
            )
    for pid, role in roles.items() if found["parties"] else ():
        pin = found["parties"][role]["fingerprint"]
        signed = found["signatures"].get(role, {})
        text = statement(pid, found["common"][role], roles)
        if not signed_by(pin, text, signed):
            problems.append(
                f"In {name} the signature of the {role} is missing, or not of what is "
                "stated with the key whose certificate is named."
            )
    return problems


def _is_part(found):
    """Whether what was opened since the run was last resumed is part of the whole."""
    if not found["resumed"]:
        return found["last_attempt"] is None
    whole = {(r, e["label"]): e for r, o in found["learned"].items() for e in o}
    part = {(r, e["label"]): e for r, o in found["last_attempt"].items() for e in o}
    return part.keys() <= whole.keys() and all(
        entry[count] <= whole[key][count]
        for key, entry in part.items()
        for count in ("openings", "values", "bits")
    )


def _differences(receipts):
    """In what receipts of one run differ that should state the same."""
    flat = {}
    # What came before an interruption each party counts by itself.
    resumed = any(found["resumed"] for found in receipts.values())
    for name, found in receipts.items():
        part = {**common_part(found), "bytes_sent": found["bytes_sent"]}
        if not resumed:
            part |= {"levels": found["levels"], "bits": found["bits"]}
        part["learned"] = {
            role: {e["label"]: e for e in entries}
            for role, entries in part["learned"].items()
        }
        flat[name] = _flat(part)
    problems = []
    for key in sorted(set().union(*flat.values())):
        values = {name: entries.get(key, "nothing") for name, entries in flat.items()}
        if any(value != next(iter(values.values())) for value in values.values()):
            said = ", ".join(f"{printable(v, 40)} in {n}" for n, v in values.items())
            problems.append(f"{printable(key)} differs: {said}.")
    if len(problems) > _MOST_NAMED:
        left = len(problems) - _MOST_NAMED
        problems = [*problems[:_MOST_NAMED], f"And {left} entries more differ."]
    return problems


#: What no signature is about, and receipts of one run have alike all the same, unless a
#: party was cut off before it could count; by who has it.
_UNSIGNED = ("resumed", "earlier_runs", "bits", "transform", "displacement", "quality")


def unsigned(receipts):
    """In what receipts differ that nobody signed, and should not differ either.

    Parameters
    ----------
    receipts : dict
        see `check`.

    Returns
    -------
    remarks : list of str
    """
    remarks = []
    for entry in _UNSIGNED:
        have = {name: f[entry] for name, f in receipts.items() if entry in f}
        said = [value for value in have.values() if value is not None]
        if any(value != said[0] for value in said):
            remarks.append(f"{entry} is not the same in {' and '.join(have)}.")
    matched = {
        name: plausibility.MISMATCH in found["warnings"]
        for name, found in receipts.items()
        if found["role"] != ROLES[HELPER]
    }
    if len(set(matched.values())) > 1:
        names = " and ".join(matched)
        remarks.append(f"Of {names} only one warns that the images hardly match.")
    for name, found in receipts.items():
        total = sum(sum(phases.values()) for phases in found["bytes_sent"].values())
        if total != found["bytes_total"]:
            remarks.append(f"The bytes sent do not add up in {name}.")
    return remarks


def _flat(value, name=""):
    """Values in nested tables and lists by dotted names."""
    if isinstance(value, list):
        value = {str(i): item for i, item in enumerate(value)}
    if not isinstance(value, dict):
        return {name: value}
    flat = {}
    for key, item in value.items():
        flat |= _flat(item, f"{name}.{key}" if name else key)
    return flat


def check_files(receipts, files):
    """Which of the files that receipts are about these are.

    Parameters
    ----------
    receipts : dict
        see `check`.
    files : sequence of str
        this site's own.

    Returns
    -------
    found, problems : list of str
    """
    found, problems = [], []
    for file in files:
        about, shown = [], printable(file, 1000)
        for name, one in receipts.items():
            try:
                digest = file_hash(one["run"], file)
            except OSError as exc:
                raise InputError(
                    f"cannot read {shown}: {exc.strerror}; check its name"
                ) from None
            hashes = one.get("files", {})
            about += [f"the {w} of {name}" for w, h in hashes.items() if h == digest]
        if about:
            found.append(f"{shown} is {' and '.join(about)}.")
        else:
            problems.append(
                f"{shown} is none of the files that the run was about by "
                "these receipts; only the receipt of its owner names a file."
            )
    return found, problems


# -- saying ------------------------------------------------------------------


def report(receipts, files, problems):
    """All receipts as one text.

    Parameters
    ----------
    receipts : dict
        see `check`.
    files : list of str
        what is known of files.
    problems : list of str

    Returns
    -------
    text : str
    """
    first, remarks = next(iter(receipts.values())), unsigned(receipts)
    results, warnings = {}, [INSECURE] if first["insecure"] else []
    for found in receipts.values():
        # Who gets the result has it alike.
        results |= dict.fromkeys(result_lines(found) + quality_lines(found))
        role = found["role"][:1].upper() + found["role"][1:]
        warnings += [f"{role}: {w}" for w in found["warnings"]]
    computed = []
    if first["operation"]:
        computed.append(f"It was {title_of(first)}.")
    for name, value in (first["parameters"] or {}).items():
        computed.append(f"    {printable(name)} = {printable(value)}")
    sections = {
        "What this is": run_lines(first),
        "What was computed": computed,
        "What each party learned": learned_lines(in_own_words(first)),
        "Result": [*results],
        "What crossed the network": traffic_lines(first),
        "Receipts": [_described(name, found) for name, found in receipts.items()],
        "Files": files,
        "Warnings": warnings,
        "What differs of what nobody signed": remarks,
        "What is wrong": problems,
    }
    verdict = _verdict(receipts, problems, remarks)
    return "\n" + sections_text(sections) + "\n\n" + verdict


def _described(name, found):
    versions = ", ".join(f"{n} {v}" for n, v in found["versions"].items())
    return f"{name} is the {found['role']}'s, written with {versions}."


def _verdict(receipts, problems, remarks):
    if remarks and not problems:
        verdict = _verdict(receipts, problems, ())
        return f"{verdict} But see what differs of what nobody signed, above."
    if problems:
        count = len(problems)
        return f"NOT CONSISTENT: see the {count} point{'s'[: count > 1]} above."
    signed = all(found["parties"] for found in receipts.values())
    roles = roles_of(next(iter(receipts.values())))
    count = _number(len(roles))
    how = "not signed, because all parties were on one machine"
    if signed:
        how = f"signed with the {count} keys whose certificates are named above"
    missing = set(roles) - {found["role"] for found in receipts.values()}
    if missing and not signed:
        return f"Consistent in itself, {how}."
    if missing:
        names = " and ".join(f"the {role}'s" for role in sorted(missing))
        return f"Consistent, {how}; {names} receipt was not given."
    count = "both" if len(roles) == 2 else f"all {count}"
    return f"Consistent: {count} receipts are of one run and state the same, {how}."


def _number(count):
    return {2: "two", 3: "three"}.get(count, str(count))
