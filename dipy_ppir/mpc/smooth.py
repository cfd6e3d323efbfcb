r"""Smooth functions of shared numbers between 1 and 4.

x is a word of the owners' parts, scaled by a quarter of the ring's size (see
`normalize`), and is opened as :math:`c' = x + m` modulo 4, m dealt. Let C and M be the
integer parts of c' and m, and f and g what follows; then :math:`x = h + f - g` with
:math:`h = C - M` modulo 4. For each of the 4 values that C may have, the helper deals
the coefficients of the polynomial in f - 1/2 that is close to the function of
:math:`h + f - g` where that is between 1 and 4: the one that C turns out to be is a sum
over known powers.

================  ======  ======================================================
step              rounds  bytes per number, on all links
================  ======  ======================================================
`deal`            1       (degree + 1) * 4 * 16 dealt, for each function
`open_normalized` 3       those of `normalize.position_of`, and 2 words
================  ======  ======================================================

What each party sees: the helper nothing; the static owner what is dealt, hidden by
numbers that the moving owner and the helper draw; each owner the other's part of x,
hidden by its part of the mask.
"""

from typing import NamedTuple

import numpy as np

from dipy_ppir.mpc import normalize as normal
from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.ledger import HELPER
from dipy_ppir.mpc.protocols import deal, swap

#: Fraction bits of the polynomials' coefficients, of the powers, and of the result.
COEFFICIENT_BITS, POWER_BITS = 38, 40
FINE_BITS = COEFFICIENT_BITS + POWER_BITS


def polynomials(function, degree):
    """Power-basis coefficients in l of f(h + l), for h = 4, 1, 2 and 3.

    Close for all l in (-1, 1) where h + l lies between 1 and 4. The error of the
    logarithm is below 5e-12 with degree 18 and 1e-7 with degree 12 for h = 2, and far
    below that for the others.

    Returns
    -------
    coefficients : array of float, shape (degree + 1, 4)
    """
    nodes = np.cos(np.pi * (np.arange(200) + 0.5) / 200)
    columns = []
    for h in (4, 1, 2, 3):
        low, high = max(h - 1, 1), min(h + 1, 4)
        x = (low + high) / 2 + (high - low) / 2 * nodes
        fit = np.polynomial.Chebyshev.fit(
            x - h, function(x), degree, domain=[low - h, high - h]
        )
        columns.append(fit.convert(kind=np.polynomial.Polynomial).coef)
    return np.stack(columns, axis=1)


def deal_coefficients(session, mask, table, n):
    """Deal the coefficients of a function for n numbers.

    Parameters
    ----------
    session : Session
    mask : array of words, shape (n,)
        the masks m, at the helper; ignored elsewhere.
    table : array of float, shape (degree + 1, 4)
        as made by `polynomials`.

    Returns
    -------
    coefficients : array of uint64, shape (degree + 1, 4, n, 2)
        of the powers of f - 1/2, for every C, in the ring of 128 bits; this owner's
        part, at the helper None.
    """
    coefficients = _masked(mask, table) if session.pid == HELPER else None
    shape = (len(table), 4, n, 2)
    return deal(session, "coefficients", coefficients, shape, minus=R128.sub)


def _masked(mask, table):
    whole, rest = _split(mask)
    rest -= 0.5
    q = np.stack([table[:, (c - whole) % 4] for c in range(4)], axis=1)
    # The polynomials in l = (f - 1/2) - rest as polynomials in f - 1/2.
    last = len(table) - 1
    for i in range(last):
        for k in range(last - 1, i - 1, -1):
            q[k] -= rest * q[k + 1]
    return R128.encode_int(np.rint(q * 2.0**COEFFICIENT_BITS))


class Opened(NamedTuple):
    """Numbers as the owners see them, behind masks: what functions are made from.

    Attributes
    ----------
    masked : array of words, shape (n,)
    position : array of uint8, shape (n,)
    fraction : array of words, shape (n,)
    """

    masked: np.ndarray
    position: np.ndarray
    fraction: np.ndarray

    def some(self, index):
        """Those of the numbers."""
        return Opened(*(array[index] for array in self))


def open_normalized(session, masked, masks, fraction):
    """Normalize masked positive integers, and open x behind fresh masks.

    Rounds: 3. Bytes: 128 + 16 per number; 64 + 8 with words of 32 bits.

    Parameters
    ----------
    session : Session
    masked : array of words, shape (n,)
        what `normalize.open_masked` opened.
    masks : normalize.Masks
    fraction : array of words, shape (n,)
        this owner's part of the masks of x.

    Returns
    -------
    opened : Opened
        at the owners; at the helper None.
    """
    if session.pid == HELPER:
        return None
    position = normal.position_of(session, masked, masks)
    opened = normal.scaled_by(masked, position, masks) + fraction
    opened += swap(session, "fraction", opened)()
    return Opened(masked, position, opened)


def evaluate(opened, coefficients, bound):
    """The function, from what was opened and dealt, at an owner; local.

    Returns
    -------
    values : SharedArray, field R128, FINE_BITS fraction bits
        the helper's part is zero.
    """
    whole, fraction = _split(opened)
    total = R128.zeros(opened.shape)
    at = coefficients[:, whole, np.arange(len(whole))]
    # Powers are the same at both owners: products of floating-point numbers are the
    # same everywhere (IEEE 754).
    power = np.ones(len(fraction))
    for part in np.ascontiguousarray(at):
        R128.addmul(total, part, R128.encode_int(np.rint(power * 2.0**POWER_BITS)))
        power = power * (fraction - 0.5)
    return SharedArray(R128, total, 2, FINE_BITS, bound << FINE_BITS)


def _split(words):
    """Integer part and what follows of words that stand for numbers from 0 to 4."""
    bits = 8 * words.dtype.itemsize - 2
    whole = (words >> words.dtype.type(bits)).astype(np.intp)
    rest = words & words.dtype.type((1 << bits) - 1)
    # 52 bits are what a double holds without rounding up to 1.
    if bits > 52:
        rest = rest >> words.dtype.type(bits - 52)
    return whole, rest / 2.0 ** min(bits, 52)
