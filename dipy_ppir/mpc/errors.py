"""What can go wrong between parties, each failure under its own name.

Every class refines the builtin a caller would already catch. Messages name the
party at fault and the remedy, and never carry a value that depends on an image:
they are shown to users and some cross the network.
"""


class MPCError(Exception):
    """Base of all failures of a secure computation."""


class AfterTheEnd(Exception):
    """Raised when a session has come to its end: the other parties go on."""


class InsecureSetupError(MPCError, ValueError):
    """The set-up cannot keep a secret, for example a threshold of zero."""


class IdentityError(MPCError, ValueError):
    """This party's own key or certificate cannot be used."""


class SessionFileError(MPCError, ValueError):
    """The session file cannot be read, or says something impossible."""


class DealError(MPCError, ValueError):
    """What the helper dealt before the owners met cannot be used."""


class PeerError(MPCError, ConnectionError):
    """Something is wrong at, or with the connection to, one named party.

    Parameters
    ----------
    message : str
        what happened and what to do.
    culprit : int or None
        the party number of the party at fault.
    """

    def __init__(self, message: str, culprit: int | None = None) -> None:
        super().__init__(message)
        self.culprit = culprit


class PeerLostError(PeerError):
    """A party closed its connection, or its process died."""


class PeerTimeoutError(PeerError, TimeoutError):
    """A party said nothing for longer than the time-out."""


class PeerAbortedError(PeerError):
    """A party stopped the computation and said so."""


class ProtocolError(PeerError):
    """A party sent something that the protocol does not allow at this point."""


class AuthenticationError(PeerError):
    """A party did not prove that it belongs to this session."""


class OutOfStepError(PeerError):
    """A party is at another of several sessions that are held one after the other.

    Parameters
    ----------
    message, culprit
        see `PeerError`.
    ahead : bool
        whether it is at a later one, so that it will not come to this one any more.
    """

    def __init__(
        self, message: str, culprit: int | None = None, *, ahead: bool
    ) -> None:
        super().__init__(message, culprit)
        self.ahead = ahead


class CertificateError(AuthenticationError):
    """A party showed another certificate than the one pinned, or refused this one."""


class ParameterMismatchError(MPCError, ValueError):
    """The parties do not agree on a public parameter.

    Parameters
    ----------
    message : str
    entry : str, optional
        which parameter it is.
    """

    def __init__(self, message: str, entry: str | None = None) -> None:
        super().__init__(message)
        self.entry = entry


class FixedPointOverflowError(MPCError, OverflowError):
    """A value, or what may become of it, does not fit the field."""


class NoiseBudgetError(MPCError, ArithmeticError):
    """Encrypted numbers would leave no room for the noise that hides them."""


class RoundingError(MPCError, ArithmeticError):
    """A number left its range, so that shares of it do not stand for it any more."""

    def __init__(self) -> None:
        super().__init__(
            "a number of the computation left its range, and spoilt the result: by "
            "chance, which happens once in more than a million registrations, or "
            "because the images are nothing but sharp noise. Start again; if it "
            "happens again, smooth the images, or use a smaller step_length or a "
            "larger radius"
        )


class UndeclaredOpeningError(MPCError, PermissionError):
    """The program tried to open a value that no protocol declared."""
