"""What a session file agreed on, and that a call asks for nothing else.

A party may call the registration from Python with any arguments. What it asks for is
compared with the session file before anything is sent: the file is what people read.
"""

from dipy_ppir.align.alone import check_ahead, check_alone, told
from dipy_ppir.align.parameters import (
    AffineParameters,
    FreeFormParameters,
    ParameterError,
    PointParameters,
    SynParameters,
)
from dipy_ppir.mpc.errors import ParameterMismatchError, SessionFileError

#: Operations of session files to their parameters.
SCHEMAS = {
    "affine": AffineParameters,
    "syn": SynParameters,
    "points": PointParameters,
    "freeform": FreeFormParameters,
}
#: What a session file says elsewhere than in [parameters].
_ELSEWHERE = ("reveal", "result_to")
#: What it cannot say: without a bound on evaluations nobody knows what will be opened.
_NEVER = ("method",)


def entries(operation):
    """Names that [parameters] may have."""
    fields = SCHEMAS[operation].model_fields
    return [name for name in fields if name not in _ELSEWHERE + _NEVER]


def parameters_of(plan):
    """The parameters that a session file asks for, those by default included.

    Parameters
    ----------
    plan : SessionFile

    Returns
    -------
    parameters : AffineParameters or SynParameters

    Raises
    ------
    SessionFileError
        if the file asks for something impossible.
    """
    if plan.operation not in SCHEMAS:
        raise SessionFileError(
            f"operation = {plan.operation!r} is not known; choose one of "
            f"{', '.join(map(repr, SCHEMAS))}"
        )
    if plan.reveal is None:
        wanted = SCHEMAS[plan.operation].model_fields["reveal"].description
        raise SessionFileError(
            f"the session file must say what may be revealed: give reveal = {wanted}"
        )
    known = entries(plan.operation)
    strangers = sorted(set(plan.parameters) - set(known))
    if strangers:
        raise SessionFileError(
            f"[parameters] has no entry {strangers[0]!r} for operation "
            f"{plan.operation!r}; it may have: {', '.join(known)}"
        )
    if isinstance(plan.parameters.get("starting_affine"), list):
        raise SessionFileError(
            "starting_affine in [parameters] cannot be a matrix, which only the moving "
            "owner knows: it passes it in its call from Python; leave it out here"
        )
    try:
        parameters = SCHEMAS[plan.operation](**plan.arguments)
        if plan.alone:
            check_alone(plan.operation, parameters)
        if plan.helper == "ahead":
            check_ahead(plan.operation, parameters)
            told(plan, parameters)
        return parameters
    except ParameterError as exc:
        raise SessionFileError(f"the parameters cannot be used: {exc}") from None


def keep_to(session, operation, call):
    """Refuse a call that asks for something else than the session file.

    Parameters
    ----------
    session : Session or None
        without a session file there is nothing to keep to.
    operation : str
        of the call.
    call : dict
        parameters to their values, as JSON has them.

    Raises
    ------
    ParameterMismatchError
        naming the parameter, what the file says and what the call does.
    """
    if session is None or session.plan is None:
        return
    plan = session.plan
    agreed = parameters_of(plan).plain()
    if plan.operation != operation:
        raise ParameterMismatchError(
            f"the session file is for operation {plan.operation!r}, but this call is "
            f"for {operation!r}; call the other function, or change the session file "
            "at all parties"
        )
    for name, value in call.items():
        # What no file can say must be left out.
        wanted = agreed.get(name, {})
        if value != wanted:
            raise ParameterMismatchError(
                f"{name} is {wanted!r} by the session file, but {value!r:.100} in this "
                "call; pass **session.parameters and nothing that contradicts them, or "
                "change the session file at all parties"
            )
