"""A receipt that somebody else may have written, read from a file.

It comes from another site, or out of a drawer: what is in it is not believed. Every
entry is checked before anything is done with it, so that what is shown is of the
expected kind and without a control character.
"""

import json
import math

from dipy_ppir.mpc.frame import parse_metadata
from dipy_ppir.mpc.ledger import DECLARATIONS, MOST_PARTIES, ROLES
from dipy_ppir.mpc.pair import OWNERS
from dipy_ppir.mpc.planfile import LEAST_SITES
from dipy_ppir.mpc.record import COMMON, is_hex, parse_date
from dipy_ppir.workflows.inputs import InputError
from dipy_ppir.workflows.operations import OPERATIONS

#: Larger files are no receipts.
MAX_BYTES = 1 << 20
#: Longer lists no receipt has.
_MOST = 100
#: What a receipt of sites that add up is of.
TEMPLATE = "template"


def load(path, *, templates=False):
    """Read a receipt that somebody else may have written.

    Parameters
    ----------
    path : str or Path
    templates : bool, optional
        whether it may be of a template; else only of a registration.

    Returns
    -------
    receipt : dict

    Raises
    ------
    InputError
        if it is none, in one line.
    """
    name = printable(str(path), 1000)
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as exc:
        raise InputError(
            f"cannot read the receipt {name}: {exc.strerror}; check its name"
        ) from None
    if len(data) > MAX_BYTES:
        raise InputError(
            f"{name} is too large for a receipt; give the receipt.json of a run"
        )
    try:
        found = parse_metadata(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(
            f"{name} is not a receipt (a JSON object); give the receipt.json of a run"
        )
    if found.get("operation") == TEMPLATE and not templates:
        raise InputError(
            f"{name} is the receipt of a template, which dipy_ppir_receipt reads; give "
            "one of a registration here"
        )
    roles = roles_of(found)
    if found.get("operation") == TEMPLATE and not _are_sites(roles):
        raise InputError(
            f"{name} is no receipt of this version of dipy_ppir: it does not name the "
            "sites that built the template; ask its owner for the file as it was "
            "written"
        )
    for entry, fits in _entries(roles).items():
        if entry in found and fits(found[entry]):
            continue
        if entry == "run" and found.get(entry, "") is None:
            raise InputError(
                f"{name} is the receipt of a metric by itself, which belongs to no "
                "run; give one of a registration"
            )
        raise InputError(
            f"{name} is no receipt of this version of dipy_ppir: its entry {entry!r} "
            "is missing, or not what a receipt has there; ask its owner for the file "
            "as it was written"
        )
    for entry, fits in _RESULTS.items():
        if entry in found and not fits(found[entry]):
            raise InputError(
                f"the entry {entry!r} of {name} is not what a receipt has there; ask "
                "its owner for the file as it was written"
            )
    if found["resumed"] and found["last_attempt"] is None:
        raise InputError(
            f"{name} is of a run that was resumed, but lacks what was opened since; "
            "ask its owner for the file as it was written"
        )
    for label in _labels(found):
        if label not in DECLARATIONS:
            raise InputError(
                f"{name} names an opening {printable(label)!r} that this program does "
                "not know; read it with the version that wrote it, "
                f"{found['versions'].get('dipy_ppir')}"
            )
    return found


def without_own(found):
    """A receipt without what is its party's own, which no signature is about."""
    entries = _entries(roles_of(found))
    kept = [name for name in found if name in entries or name in COMMON]
    return {name: found[name] for name in kept} | {"warnings": []}


def roles_of(found):
    """Names of the roles of all parties of a run, in their order.

    Of a template they are the sites' that its receipt says were there; two owners may
    have been alone, or have met when the helper had dealt.
    """
    parties = found.get("parties")
    if found.get("operation") != TEMPLATE:
        two = found.get("m") == len(OWNERS) or found.get("deal") is not None
        return [*(OWNERS if two else ROLES).values()]
    return [*parties] if isinstance(parties, dict) else []


def _are_sites(roles):
    return LEAST_SITES <= len(roles) <= MOST_PARTIES and all(map(_is_text, roles))


def in_own_words(found):
    """A receipt with this program's words for what was opened, not the writer's."""
    learned = {
        role: [{**e, "meaning": DECLARATIONS[e["label"]].meaning} for e in entries]
        for role, entries in found["learned"].items()
    }
    return {**found, "learned": learned}


def _labels(found):
    for learned in (found["learned"], found["last_attempt"] or {}):
        yield from (e["label"] for entries in learned.values() for e in entries)


def printable(value, most=100):
    """Something that a stranger wrote, fit to be shown."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= most else text[: most - 3] + "..."


def _is_text(value):
    return isinstance(value, str) and value.isprintable() and len(value) <= 4000


def _is_count(value):
    return type(value) is int and 0 <= value < 1 << 63


def _is_size(value):
    return _is_count(value) and value > 0


def _is_number(value):
    # Too large an integer is no number to `isfinite`.
    return type(value) in (int, float) and abs(value) < 1e18 and math.isfinite(value)


def _is_length(value):
    return _is_number(value) and value >= 0


def _is_plain(value):
    return isinstance(value, dict) and all(map(_is_text, value))


def _maybe(fits):
    return lambda value: value is None or fits(value)


def _each(fits):
    return lambda value: (
        isinstance(value, list) and len(value) <= _MOST and all(map(fits, value))
    )


def _of_axes(fits):
    """Two or three of them."""
    return lambda value: (
        isinstance(value, list) and len(value) in (2, 3) and all(map(fits, value))
    )


def _by_role(roles, fits, *, all_of_them=True):
    def check(value):
        return (
            isinstance(value, dict)
            and (set(value) == set(roles) if all_of_them else set(value) <= set(roles))
            and all(map(fits, value.values()))
        )

    return check


def _named(fits):
    return lambda value: _is_plain(value) and all(map(fits, value.values()))


def _having(**entries):
    return lambda value: (
        isinstance(value, dict)
        and all(name in value and fits(value[name]) for name, fits in entries.items())
    )


_is_hash = _maybe(lambda value: is_hex(value, 64))
_is_opened = _each(
    _having(
        label=_is_text,
        meaning=_is_text,
        shape=_is_text,
        openings=_is_count,
        values=_is_count,
        bits=_is_number,
    )
)
_is_deal = _having(number=lambda value: is_hex(value, 32))
_is_grid = _having(shape=_each(_is_size), voxel_size=_each(_is_number))


def _entries(roles):
    """What every receipt of a run of these roles has, and how it looks."""
    return {
        "run": lambda value: is_hex(value, 64),
        "role": lambda value: value in roles,
        "date": lambda value: parse_date(value) is not None,
        "duration": _is_length,
        "earlier_runs": _each(lambda value: is_hex(value, 64)),
        "title": _maybe(_is_text),
        "session_file": _is_hash,
        "parties": _maybe(
            _by_role(roles, _having(name=_is_text, fingerprint=_is_text))
        ),
        "deal": _maybe(
            lambda value: _is_deal(value) and all(map(_is_text, value.values()))
        ),
        "images": _maybe(_named(_is_grid)),
        "operation": lambda value: value is None or value in [*OPERATIONS, TEMPLATE],
        "parameters": _maybe(_is_plain),
        "versions": _named(_is_text),
        "source": lambda value: is_hex(value, 64),
        "m": _is_count,
        "t": _is_count,
        "insecure": lambda value: type(value) is bool,
        "fields": _is_text,
        "learned": _by_role(roles, _is_opened),
        "last_attempt": _maybe(_by_role(roles, _is_opened)),
        "levels": _each(
            _having(
                party=lambda value: value in roles,
                samples=_is_size,
                numbers=_is_count,
                bits=_is_number,
            )
        ),
        "bits": _by_role(roles, _is_number),
        "voxels": _by_role(roles, _is_size, all_of_them=False),
        "bytes_sent": _by_role(roles, _named(_is_count)),
        "bytes_total": _is_count,
        "resumed": _is_count,
        "warnings": _each(_is_text),
        "common": _by_role(roles, _is_hash),
        "signatures": _by_role(
            roles, _having(signature=_is_text, certificate=_is_text), all_of_them=False
        ),
    }


#: What a receipt may have besides.
_RESULTS = {
    "transform": _having(
        shift=_of_axes(_is_number),
        turn=_is_length,
        axis=_maybe(_of_axes(_is_number)),
        scales=_of_axes(_is_number),
        mirrored=lambda value: type(value) is bool,
    ),
    "displacement": _having(
        mean=_is_number, percentile_95=_is_number, largest=_is_number
    ),
    "quality": _having(
        voxels=_is_size,
        non_positive_jacobian=_is_count,
        percent=_is_number,
        smallest_jacobian=_is_number,
        largest_jacobian=_is_number,
    ),
    "metric": _having(name=_is_text, value=_is_number),
    "course": _each(
        _having(
            step=_is_text,
            level=_is_count,
            measure=_is_text,
            evaluations=_is_count,
            values=_each(_is_number),
        )
    ),
    "deal_bytes": _is_count,
    "files": _named(_is_hash),
    "arrays": _named(_is_hash),
}
