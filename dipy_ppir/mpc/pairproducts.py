r"""Products of numbers on shares of two owners alone, modulo 2**128.

With the owners' parts :math:`x_0 + x_1` and :math:`y_0 + y_1` a product is

.. math:: x_0 y_0 + x_1 y_1 + x_0 y_1 + y_0 x_1,

of which each owner has one of the first two terms, and the others are products of one
number that each of them knows. For such a u of the moving and v of the static owner
there are made ahead (`multiplications`): random a and b, which the one and the other
knows, and parts :math:`c_0 + c_1 = a b` (Beaver 1991). The owners send each other
:math:`d = u - a` and :math:`e = v - b`; then

.. math:: u v = (u e + c_0) + (d b + c_1).

==============  ======  =============================  =======================
step            rounds  bytes per product, both ways   products made ahead
==============  ======  =============================  =======================
`crossed`       1       32                             1
`multiplied`    1       64                             2
`squared`       1       32                             1
`shifted`       0       0                              0
==============  ======  =============================  =======================

What each owner sees: numbers less uniform ones that only the other owner knows and that
serve once. A simulator draws them. An owner that sends others than it should makes
results wrong, by a multiple of a number of the other owner's, and learns nothing by
that before something is opened; where the products are made see `multiplications`.
"""

import numpy as np

from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.ledger import MOVING
from dipy_ppir.mpc.protocols import constant, shift_right, swap


def crossed(session, mine):
    """Products of numbers of the moving owner with as many of the static owner.

    Rounds: 1.

    Parameters
    ----------
    session : PairSession
    mine : array of uint64, shape (n, 2)
        this owner's numbers, in the ring of 128 bits.

    Returns
    -------
    part : array of uint64, shape (n, 2)
        this owner's part of the products.
    """
    factor, part = session.multiplications.take(len(mine))
    hidden = R128.sub(mine, factor)
    theirs = swap(session, "factors", hidden)()
    if session.pid == MOVING:
        return R128.add(R128.mul(mine, theirs), part)
    return R128.add(R128.mul(theirs, factor), part)


def multiplied(session, x, y):
    """Parts of the products of numbers on shares; rounds: 1.

    Parameters
    ----------
    session : PairSession
    x, y : array of uint64, shape (n, 2)
        this owner's parts.

    Returns
    -------
    part : array of uint64, shape (n, 2)
    """
    pair = (x, y) if session.pid == MOVING else (y, x)
    first, second = np.split(crossed(session, np.concatenate(pair)), 2)
    return R128.add(R128.mul(x, y), R128.add(first, second))


def squared(session, x):
    """Parts of the squares of numbers on shares; see `multiplied`."""
    return R128.add(R128.mul(x, x), R128.scale(crossed(session, x), 2))


def shifted(session, part, bits, target=R128):
    """This owner's part of numbers on shares without their low bits; local.

    Each owner shifts its part, as a signed number (Mohassel and Zhang 2017, section
    4.1). The result is the number divided by ``2**bits``, rounded down, or one more,
    unless the parts as signed numbers differ from it by a multiple of 2**128. The first
    part is uniform, so that happens with probability ``|x| / 2**128``.

    Parameters
    ----------
    session : PairSession
    part : array of uint64, shape (..., 2)
    bits : int
    target : Field, optional
        ring of the result.

    Returns
    -------
    part : array, in the target ring
    """
    if session.pid == MOVING:
        return _shifted(part, bits, target)
    return target.neg(_shifted(R128.neg(part), bits, target))


def _shifted(words, bits, target):
    """Signed words, shifted: by half the ring's size they are made unsigned."""
    half = R128.modulus >> 1
    raised = R128.add(words, constant(R128, half, words))
    raised = shift_right(R128, raised, bits, target)
    return target.sub(raised, constant(target, half >> bits, raised))
