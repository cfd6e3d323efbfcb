"""Which protocols a session computes with: with a helper, or two owners alone."""

from dipy_ppir.mpc import freeform, leastsquares, pairsplines, pairsquares
from dipy_ppir.mpc.algebra import Shares
from dipy_ppir.mpc.information import Information
from dipy_ppir.mpc.numbers import SecretNumbers
from dipy_ppir.mpc.pair import PairSession
from dipy_ppir.mpc.pairalgebra import PairShares
from dipy_ppir.mpc.pairinformation import PairInformation
from dipy_ppir.mpc.pairnumbers import PairNumbers


def alone(session):
    """Whether the session is one of two owners, without a helper."""
    return isinstance(session, PairSession)


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
    return (PairNumbers if alone(session) else SecretNumbers)(session, **options)


def shares(session):
    """The language of protocols on the shares of a session's parties.

    Parameters
    ----------
    session : Session

    Returns
    -------
    world : Shares or PairShares
    """
    return PairShares(session) if alone(session) else Shares(session)


def least_squares(session, dim, bits, parameters, *, voxels, samples):
    """Gauss-Newton steps: see `leastsquares.SecretSteps`, `pairsquares.PairSteps`.

    Parameters
    ----------
    session : Session
    dim, bits : int
    parameters : int
        how many numbers a step has.
    voxels, samples : int
        of the image, and how many of them each step takes.
    """
    if alone(session):
        return pairsquares.PairSteps(session, dim, bits, parameters, voxels, samples)
    return leastsquares.SecretSteps(session, dim, bits)


def mean_products(session, digits):
    """See `leastsquares.SecretProducts` and `pairsquares.PairProducts`."""
    if alone(session):
        return pairsquares.PairProducts(session, digits)
    return leastsquares.SecretProducts(session, digits)


def splines(session):
    """See `freeform.SharedSteps` and `pairsplines.PairSteps`."""
    if alone(session):
        return pairsplines.PairSteps(session)
    return freeform.SharedSteps(session)


def information(session, *args, backend="packed", anew=False, sent=None, **options):
    """Evaluations of the mutual information at a session's parties.

    Parameters
    ----------
    session : Session
    *args, backend, **options
        see `information.Information`.
    anew : bool, optional
        whether categories are shared for every evaluation.
    sent : Sent, optional
        of two owners alone: the attribute `sent` of another one for the same static
        image at the same samples.

    Returns
    -------
    information : Information or PairInformation

    Raises
    ------
    ValueError
        for a backend that needs a helper, of two owners alone.
    """
    if not alone(session):
        return Information(session, *args, backend=backend, **options)
    if backend != "packed":
        raise ValueError(
            f'backend={backend!r} needs a helper; two owners alone have "packed"'
        )
    return PairInformation(session, *args, anew=anew, sent=sent, **options)
