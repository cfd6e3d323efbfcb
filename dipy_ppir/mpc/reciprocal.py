r"""Reciprocals of shared positive integers.

With :math:`v\,2^{b-1-k} = 2^{b-2} x` (see `normalize`; b the bits of a word),

.. math:: \frac 1 v = \frac{1}{x} \cdot \frac{2^{b-1-k}}{2^{b-2}},

where 1/x is a polynomial (see `smooth`) and the power of two is looked up with k. Both
are left apart, because what they are multiplied with decides where digits are dropped.

Rounds: as `normalize` and `smooth`. Bytes: 13 * 4 * 16 + 16 b dealt for each number.
The relative error is below 1e-6.
"""

from typing import NamedTuple

import numpy as np

from dipy_ppir.mpc import normalize as normal
from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.ledger import HELPER
from dipy_ppir.mpc.smooth import (
    FINE_BITS,
    deal_coefficients,
    evaluate,
    polynomials,
)

DEGREE = 12
_POLYNOMIALS = polynomials(np.reciprocal, DEGREE)


class Masks(NamedTuple):
    """What is dealt for the reciprocals of n numbers; at the helper nothing.

    Attributes
    ----------
    coefficients : array of uint64, shape (DEGREE + 1, 4, n, 2)
    powers : array of uint64, shape (bits, n, 2)
    """

    coefficients: np.ndarray
    powers: np.ndarray


class Reciprocal(NamedTuple):
    """``fraction * power / 2**(bits - 2)``, in the ring of 128 bits.

    Attributes
    ----------
    fraction : SharedArray, shape (n,), FINE_BITS fraction bits
        between 1/4 and 1; the helper's part is zero.
    power : SharedArray, shape (n,)
        an integer; the helper's part is zero.
    """

    fraction: SharedArray
    power: SharedArray


def deal_masks(session, fraction, position, ring):
    """Deal what `reciprocal` needs.

    Parameters
    ----------
    session : Session
    fraction, position : array, shape (n,)
        the masks of the numbers that are normalized, see `smooth` and `normalize`.
    ring : WordRing

    Returns
    -------
    masks : Masks
    """
    n = len(position)
    coefficients = deal_coefficients(session, fraction, _POLYNOMIALS, n)
    powers = [1 << ring.bits - 1 - k for k in range(ring.bits)]
    return Masks(coefficients, normal.deal_function(session, position, ring, powers))


def reciprocal(session, opened, masks, n, ring):
    """Reciprocals of n numbers that `smooth.open_normalized` opened; local.

    Returns
    -------
    reciprocal : Reciprocal
    """
    bound = 1 << ring.bits - 1
    if session.pid == HELPER:
        zero = R128.zeros((n,))
        fraction = SharedArray(R128, zero, 2, FINE_BITS, 1 << FINE_BITS)
        return Reciprocal(fraction, SharedArray(R128, zero, 2, 0, bound))
    fraction = evaluate(opened.fraction, masks.coefficients, 1)
    power = normal.look_up(opened.position, masks.powers)
    return Reciprocal(fraction, SharedArray(R128, power, 2, 0, bound))
