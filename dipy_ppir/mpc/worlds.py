"""Which protocols a session computes with: with a helper, or two owners alone."""

from dipy_ppir.mpc.numbers import SecretNumbers
from dipy_ppir.mpc.pair import PairSession
from dipy_ppir.mpc.pairnumbers import PairNumbers


def numbers(session, **options):
    """Numbers on the shares of a session's parties.

    Parameters
    ----------
    session : Session
    **options
        see `numbers.SharedNumbers`.

    Returns
    -------
    numbers : SecretNumbers or PairNumbers
    """
    kind = PairNumbers if isinstance(session, PairSession) else SecretNumbers
    return kind(session, **options)
