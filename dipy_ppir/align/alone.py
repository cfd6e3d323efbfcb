"""Which registrations two owners can make without a helper that is there.

Alone they need a protocol for two: `ALONE` is the one table of those that there are.
With a helper that deals before they meet they need one in which it receives nothing:
`AHEAD` is the table of these. Calls, commands and session files are compared with them
before a connection is opened.
"""

from dipy_ppir.align.parameters import ParameterError, shown
from dipy_ppir.mpc.errors import SessionFileError
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.session import PARTIES

#: Numbers of parties that a registration may have.
NUMBERS = (PARTIES, 2)
#: Operations to rows of parameters: one row that is met is enough.
ALONE = {
    "affine": (
        {"metric": "MI", "reveal": "transform"},
        {"metric": "SSD"},
    ),
    "syn": ({"reveal": "map"},),
    "freeform": ({},),
    "points": ({},),
}
#: The same of those for which a helper can deal ahead.
AHEAD = {
    "affine": ({"metric": "SSD"},),
    "syn": ({"reveal": "map"},),
    "freeform": ({},),
    "points": ({},),
}
#: What the protocols for two are written in; others are for tests of those for three.
_BACKEND = "packed"


def check_alone(operation, parameters):
    """Raise `ParameterError` unless two owners can make a registration alone.

    Parameters
    ----------
    operation : str
        as session files have it.
    parameters : Parameters
    """
    if set(getattr(parameters, "pipeline", ())) == {"center_of_mass"}:
        return  # whatever the metric, which is not asked
    wanted = _missing(ALONE.get(operation, ()), parameters)
    if wanted is not None:
        raise ParameterError(
            f"this registration needs a helper; two owners alone can make one with "
            f"{wanted}: choose that, or add a helper"
        )


def check_ahead(operation, parameters):
    """Raise `ParameterError` unless a helper can deal ahead for a registration.

    Parameters
    ----------
    operation : str
        as session files have it.
    parameters : Parameters
    """
    if operation not in AHEAD:
        raise ParameterError(
            f"for operation {operation!r} a helper cannot deal before the owners meet; "
            f"it can for {', '.join(map(repr, AHEAD))}: let it meet them"
        )
    wanted = _missing(AHEAD[operation], parameters)
    if wanted is not None:
        raise ParameterError(
            "for this registration a helper cannot deal before the owners meet; it can "
            f"with {wanted}: choose that, or let it meet them"
        )


def _missing(rows, parameters):
    """What parameters lack to fit one of some rows, in words; None for nothing."""
    backend = getattr(parameters, "backend", _BACKEND)
    if backend != _BACKEND:
        return f"{{backend}} {_BACKEND!r}"
    if any(_fits(row, parameters) for row in rows):
        return None
    return "; or ".join(map(_in_words, rows))


def told(plan, parameters):
    """What owners will tell of their data, as a helper that deals ahead must know.

    Parameters
    ----------
    plan : SessionFile
    parameters : Parameters
        those of the session file, checked.

    Returns
    -------
    told : dict
        see `DealingSession`.

    Raises
    ------
    SessionFileError
        if the session file does not say it.
    """
    names = {MOVING: "moving", STATIC: "static"}
    points = plan.operation == "points"
    dim = getattr(parameters, "dim", None)
    for owner, about in plan.deal.items():
        shape = about["shape"]
        good = len(shape) in ((2, 3) if dim is None else (dim,))
        if points:
            good = shape[1:] in ([2], [3])
        if not good:
            raise SessionFileError(
                f"shape in [deal.{names[owner]}] is {shape}, and must be "
                + (
                    "how many points there are and 2 or 3, of their coordinates"
                    if points
                    else f"of {dim or '2 or 3'} dimensions"
                )
            )
        wanted = {"shape"} if points else {"shape", "grid2world"}
        if about.keys() - {"sealing"} != wanted:
            raise SessionFileError(
                f"[deal.{names[owner]}] must have {' and '.join(sorted(wanted))} and "
                f"sealing for operation {plan.operation!r}; dipy_ppir_session describe "
                "prints them"
            )
    if points:
        said = {p: {names[p]: about["shape"]} for p, about in plan.deal.items()}
        return {"points": said}
    keys = "shape", "grid2world"
    said = {
        p: {names[p]: {key: about[key] for key in keys}}
        for p, about in plan.deal.items()
    }
    return {"images": said}


def _fits(row, parameters):
    return all(getattr(parameters, name) == value for name, value in row.items())


def _in_words(row):
    return ", ".join(f"{{{name}}} {shown(value)}" for name, value in row.items())


def check_parties(parties, session, operation, parameters):
    """Raise ValueError unless so many parties can make a registration.

    Parameters
    ----------
    parties : int or None
        3 or 2, as the caller has it; None for what the session has, or 3.
    session : Session or None
    operation : str
        as session files have it.
    parameters : Parameters
    """
    if parties is not None and (type(parties) is bool or parties not in NUMBERS):
        raise ParameterError(
            "{parties} must be 3, for two owners and a helper, or 2, for two owners "
            f"alone; got {shown(parties)}"
        )
    if session is not None and session.ahead:
        count = PARTIES
        check_ahead(operation, parameters)
    else:
        count = parties if session is None else len(session.roles)
    if parties not in (None, count):
        raise ParameterError(
            f"{{parties}} is {parties}, but the session has {count}; leave it out"
        )
    if count == 2:
        check_alone(operation, parameters)
