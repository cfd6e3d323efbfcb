r"""Smooth functions of positive integers on shares of two owners alone.

An integer v below 2**b, on shares modulo 2**b, is normalized: boolean circuits
(`circuits`) find its highest bit k, and

.. math:: x = v \, 2^{b-1-k} / 2^{b-1}

is between 1 and 2. Of x each owner has a word, of which it knows the highest bit m and
the rest u, a number below 1. Where the two highest bits differ :math:`x = 1 + u_0 +
u_1`, for x is not below 1; else :math:`x = u_0 + u_1`, of which m_0 = m_1 = 1 has
turned the ring around. With :math:`a = u_0 - 1/2` and :math:`b = u_1 - 1/2` a
polynomial p in :math:`x - 3/2` is, by its Taylor series,

.. math:: p = \sum_i a^i q_i(b \mp 1/2), \qquad q_i = p^{(i)} / i!,

with minus where m_0 = m_1. That is a sum of products of a number of the moving owner
and one of the static owner, of a^i and m_0 a^i with what the static owner knows
(`pairproducts.crossed`): one round, whatever the degree d.

================  =================================  ============================
step              rounds                             products made ahead, for each
                                                     number
================  =================================  ============================
`normalized`      2, and those of `circuits.bits_of` 2, and the circuits'
                  and `circuits.highest`             transfers
`evaluated`       1                                  2 d - 1
`lifted`          1                                  1
================  =================================  ============================

What each owner sees: what it sees in `circuits` and `pairproducts`, uniform bits and
numbers.
"""

from typing import NamedTuple

import numpy as np

from dipy_ppir.mpc import circuits
from dipy_ppir.mpc.fields import R64, R128
from dipy_ppir.mpc.ledger import MOVING
from dipy_ppir.mpc.pairproducts import crossed, multiplied
from dipy_ppir.mpc.protocols import constant

#: Fraction bits of the powers, of the polynomials' coefficients, and of the result.
POWER_BITS, COEFFICIENT_BITS = 30, 30
FINE_BITS = POWER_BITS + COEFFICIENT_BITS


def polynomial(function, degree):
    """Coefficients, lowest first, in ``x - 3/2`` of a function between 1 and 2.

    The error of the logarithm is below 2e-6 with degree 6, that of the reciprocal
    below 1e-6 with degree 8.
    """
    nodes = np.cos(np.pi * (np.arange(200) + 0.5) / 200) / 2
    fit = np.polynomial.Chebyshev.fit(
        nodes, function(1.5 + nodes), degree, domain=[-0.5, 0.5]
    )
    return fit.convert(kind=np.polynomial.Polynomial).coef


LOGARITHM = polynomial(np.log, 6)
RECIPROCAL = polynomial(np.reciprocal, 8)


class Normalized(NamedTuple):
    """This owner's parts of numbers that are taken apart.

    Attributes
    ----------
    places : array of uint64, shape (bits, n, 2)
        for every bit whether it is the highest one that is set; modulo 2**128.
    power : array of uint64, shape (n, 2)
        ``2**(bits - 1 - k)``; modulo 2**128.
    fraction : array of uint64, shape (n,)
        the numbers times that; modulo ``2**bits``.
    """

    places: np.ndarray
    power: np.ndarray
    fraction: np.ndarray

    def of_place(self, values):
        """A public function of the highest bit's place; local.

        Parameters
        ----------
        values : sequence of int
            for every place.

        Returns
        -------
        part : array of uint64, shape (n, 2)
        """
        total = R128.zeros(self.fraction.shape)
        for place, value in zip(self.places, values, strict=True):
            total = R128.add(total, R128.scale(place, value))
        return total


def widened(words):
    """Words as elements of the ring of 128 bits."""
    words = words.astype(np.uint64)
    return np.stack([words, np.zeros_like(words)], axis=-1)


def normalized(session, words, bits):
    """Take positive integers apart; see the module.

    Parameters
    ----------
    session : PairSession
    words : array of uint64, shape (n,)
        this owner's part of numbers from 1, modulo ``2**bits``.
    bits : int
        up to 64.

    Returns
    -------
    normalized : Normalized
    """
    n, low = len(words), np.uint64((1 << bits) - 1)
    first = circuits.bits_of(session, words, R64, bits)
    onehot = circuits.highest(session, first)
    places = circuits.arithmetic(session, onehot, R128, n)
    power = R128.zeros((n,))
    for k, place in enumerate(places):
        power = R128.add(power, R128.scale(place, 1 << bits - 1 - k))
    fraction = multiplied(session, widened(words), power)[:, 0] & low
    return Normalized(places, power, fraction)


def evaluated(session, bits, *wanted):
    """Polynomials of normalized numbers, all in one round.

    Parameters
    ----------
    session : PairSession
    bits : int
        of the fractions.
    *wanted : tuple of (array of uint64, shape (n,); array of float, shape (d + 1,))
        `Normalized.fraction`, and a polynomial.

    Returns
    -------
    parts : list of array of uint64, shape (n, 2)
        of the values, with `FINE_BITS` fraction bits.
    """
    moving = session.pid == MOVING
    factors, alone = zip(
        *((_powers if moving else _taylor)(*split(f, bits), p) for f, p in wanted),
        strict=True,
    )
    digits = POWER_BITS if moving else COEFFICIENT_BITS
    encoded = [R128.encode_int(np.rint(f * 2.0**digits)) for f in factors]
    products = crossed(session, np.concatenate([R128.flat(e) for e in encoded]))
    out, start = [], 0
    for mine, own in zip(encoded, alone, strict=True):
        own = R128.encode_int(np.rint(own * 2.0**COEFFICIENT_BITS))
        total = R128.scale(own, 1 << POWER_BITS)
        stop = start + mine.shape[0] * mine.shape[1]
        for row in products[start:stop].reshape(mine.shape):
            total = R128.add(total, np.ascontiguousarray(row))
        out.append(total)
        start = stop
    return out


def split(fraction, bits):
    """Highest bits of words, and what follows less a half, between -1/2 and 1/2."""
    top = fraction >> np.uint64(bits - 1)
    rest = fraction & np.uint64((1 << bits - 1) - 1)
    return top.astype(bool), rest / 2.0 ** (bits - 1) - 0.5


def _powers(top, rest, coefficients):
    """The moving owner's factors, and what it adds."""
    d = len(coefficients) - 1
    powers = rest ** np.arange(d + 1)[:, None]
    return np.concatenate([powers[1:d], powers[:d] * top]), coefficients[d] * powers[d]


def _taylor(top, rest, coefficients):
    """The static owner's factors, and what it adds."""
    shift = np.where(top, 0.5, -0.5)
    p, series = np.polynomial.Polynomial(coefficients), []
    for i in range(len(coefficients) - 1):
        series.append((p(rest + shift), p(rest - shift)))
        p = p.deriv() / (i + 1)
    same, other = np.array(series).swapaxes(0, 1)
    return np.concatenate([same[1:], other - same]), same[0]


def lifted(session, words, bits):
    """Bring numbers from modulo ``2**bits`` into the ring of 128 bits, exactly.

    With the numbers shifted to lie in the lower half, the sum of an owner's words has
    turned their ring around just where the highest bit of either is set.

    Parameters
    ----------
    session : PairSession
    words : array of uint64, shape (n,)
        this owner's part of numbers below ``2**(bits - 2)`` in magnitude.
    bits : int
        up to 63.

    Returns
    -------
    part : array of uint64, shape (n, 2)
    """
    offset = 1 << bits - 2
    if session.pid == MOVING:
        words = words + np.uint64(offset)
    words = words & np.uint64((1 << bits) - 1)
    top = widened(words >> np.uint64(bits - 1))
    turns = R128.sub(top, crossed(session, top))
    part = R128.sub(widened(words), R128.scale(turns, 1 << bits))
    if session.pid == MOVING:
        part = R128.sub(part, constant(R128, offset, part))
    return part
