"""Which registrations two owners can make alone, without a helper.

A registration needs a protocol for two. `ALONE` is the one table of those that there
are; calls, commands and session files are compared with it before a connection is
opened.
"""

from dipy_ppir.align.parameters import ParameterError, shown
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
    rows = ALONE.get(operation, ())
    backend = getattr(parameters, "backend", _BACKEND)
    if backend == _BACKEND and any(_fits(row, parameters) for row in rows):
        return
    if backend != _BACKEND:
        wanted = f"{{backend}} {_BACKEND!r}"
    else:
        wanted = "; or ".join(map(_in_words, rows))
    raise ParameterError(
        f"this registration needs a helper; two owners alone can make one with "
        f"{wanted}: choose that, or add a helper"
    )


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
    count = parties if session is None else len(session.roles)
    if parties not in (None, count):
        raise ParameterError(
            f"{{parties}} is {parties}, but the session has {count}; leave it out"
        )
    if count == 2:
        check_alone(operation, parameters)
