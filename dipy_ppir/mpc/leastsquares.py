r"""Gauss-Newton steps between two owners' images, of which nothing else is opened.

The step that makes :math:`\sum_x (m(x) - s(x))^2` smallest, linearized, is

.. math:: \Delta = -H^{-1} \sum_x S(x) (m(x) - s(x)), \quad
          S_k(x) = \sum_{d,e} C_{k,de} \, g_d(x) \, y_e(x),

(equations 2 to 6 of Taiello et al. 2024), with g the gradient of the moving image where
the transform takes x, and y a linear function of the position. All of it is the moving
owner's, but for the sums :math:`\sum_x g_d(x) y_e(x) s(x)`: products of its own numbers
with the static owner's (`ownproducts`). The owners hold parts of them. The moving
owner's matrix :math:`H^{-1} C` times the static owner's part is a product of own
numbers again, and what is opened to the moving owner is the step, to a precision.

Words of 32 bits do: numbers of the static owner have `VALUE_BITS`, and the moving owner
scales its own such that no sum over a block of samples reaches 2**`SUM_BITS`; blocks
are added up in the ring of 128 bits. Nothing is truncated.

Rounds of a step: 4. Bytes on all links: ``4 dim`` for each sample, from the moving
owner, and ``52 dim (dim + 1)`` for each block of `BLOCK` samples, and a few kB; once
for each static image ``4 (dim + 1)`` a sample. The helper receives nothing.

What each party sees: see `ownproducts` and `protocols.lift`: uniform numbers. The
moving owner is opened its step, with noise of the helper's that is uniform and as wide
as the precision, which is as good as rounded: a simulator that is given the rounded
step adds the noise. No more bits can be opened than are counted, whatever the moving
owner gives: a step that is larger than promised comes round the ring and is another
number.
"""

from typing import NamedTuple

import numpy as np

from dipy_ppir.mpc.algebra import Digits, Opening, Secret, Shares, expression
from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.fields import P127, R32, R64, R128
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC, declare
from dipy_ppir.mpc.ownproducts import OwnProducts
from dipy_ppir.mpc.protocols import dither, lift, share_owners, truncate

#: Bits of the static owner's numbers, whose magnitude is at most one.
VALUE_BITS = 10
#: Samples whose products are added up in words of 32 bits, below this power of two.
BLOCK, SUM_BITS = 1 << 15, 29
#: Fraction bits of the matrix, and what its elements are below.
MATRIX_DIGITS, LARGEST_ELEMENT = 64, 1 << 30
#: Most bits of a number of a step.
MOST_STEP_BITS = 20
#: Fraction bits of values and of what divides them by the number of samples.
COUNT_DIGITS = 60
#: By a helper that only deals, the value is shown to so many parts of its bound, which
#: with noise and sign are the bits of "final_value".
_PARTS = 4000

declare(
    "update",
    receivers=(MOVING,),
    shape="number of parameters of the transform, each iteration",
    meaning="by how much the transform's parameters change in the next step, rounded",
    bits=MOST_STEP_BITS,
)


class Own(NamedTuple):
    """What the moving owner brings to a step.

    Attributes
    ----------
    gradient : array of int64, shape (dim, n)
        g, as `scale` makes it.
    matrix : array, shape (p, dim * (dim + 1))
        of the sums of the integers, in units of the precision.
    constant : array, shape (p,)
        what is added.
    positions : array, shape (dim + 1, n), optional
        y; two owners alone need it.
    index : array of int, shape (n,), optional
        which of the numbers that were shared belong to them, if not all; for steps
        that are of the `whole` image.
    """

    gradient: np.ndarray
    matrix: np.ndarray
    constant: np.ndarray
    positions: np.ndarray | None = None
    index: np.ndarray | None = None


def blocks(n):
    """Where blocks of samples begin and end."""
    return [(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]


def scale(gradient):
    """By what a gradient may be multiplied for the sums of a block to fit their words.

    Parameters
    ----------
    gradient : array, shape (dim, n)

    Returns
    -------
    scale : float
        0 if there is none.
    """
    size = np.abs(gradient)
    most = max(
        (size[:, i:j].sum(axis=1).max() for i, j in blocks(size.shape[1])), default=0
    )
    # Rounding adds half a unit to each sample, at most an eighth of the whole.
    room = 2.0 ** (SUM_BITS - VALUE_BITS) * 0.875
    return room / most if most > 0 else 0.0


def sums_of_blocks(x, y):
    """Sums of products over each block.

    Parameters
    ----------
    x, y : array of int, shape (dim, n) and (dim + 1, n)

    Returns
    -------
    sums : array, shape (blocks, dim, dim + 1)
    """
    n = x.shape[1]
    out = np.empty((len(blocks(n)), len(x), len(y)), x.dtype)
    for k, (i, j) in enumerate(blocks(n)):
        for d, row in enumerate(x):
            for e, other in enumerate(y):
                out[k, d, e] = np.dot(row[i:j], other[i:j])
    return out


class ClearSteps:
    """The same in the clear, with the same roundings, of both owners' numbers."""

    whole = False

    def __init__(self):
        self._static = None

    def share_static(self, shape, values=None):
        """See `SecretSteps.share_static`."""
        self._static = values

    def step(self, count, parameters, own):
        """See `SecretSteps.step`."""
        sums = sums_of_blocks(own.gradient, self._static).sum(axis=0)
        return np.rint(own.matrix @ sums.reshape(-1) + own.constant)


class SecretSteps:
    """Steps of a session; see the module.

    Parameters
    ----------
    session : Session
    dim : int
    bits : int
        of each number of a step, which must be smaller than 2**(bits - 1) - 1 units of
        its precision.

    Attributes
    ----------
    whole : bool
        whether the whole image is shared, whichever of its voxels are samples.
    """

    whole = False

    def __init__(self, session, dim, bits):
        self.session, self.dim, self.bits = session, dim, bits
        self._products = OwnProducts(session, R32, "least-squares")
        self._weighted = OwnProducts(session, R128, "step")

    def share_static(self, shape, values=None):
        """Share the static image's products with the positions. Rounds: 1.

        Parameters
        ----------
        shape : tuple of int
            (dim + 1, n).
        values : array of int64, at the static owner only
            of magnitude up to 2**`VALUE_BITS`.
        """
        words = None if values is None else R32.encode_int(values)
        self._products.share_static(shape, words)

    def step(self, count, parameters, own):
        """The next step, opened to the moving owner. Rounds: 4.

        Parameters
        ----------
        count : int
            number of samples.
        parameters : int
        own : Own, at the moving owner only

        Returns
        -------
        step : array, shape (parameters,), or None
            in units of the precision.
        """
        s, dim = self.session, self.dim
        shape = len(blocks(count)), dim, dim + 1
        gradient = None if own is None else own.gradient
        sums = self._products.sums(
            sums_of_blocks,
            (dim, count),
            shape,
            None if gradient is None else R32.encode_int(gradient),
            bound=(1 << SUM_BITS) - 1,
        )
        part = _added_up(lift(s, sums.reshape(-1)), shape[0]).share
        self._weighted.share_static(
            part.shape, part if s.pid == STATIC else None, wait=False
        )
        matrix = None
        if s.pid == MOVING:
            matrix = R128.encode(own.matrix, MATRIX_DIGITS, LARGEST_ELEMENT)
        step = self._weighted.sums(
            _matrix_times,
            (parameters, *part.shape),
            (parameters, 2),
            matrix,
            bound=(1 << 127) - 1,
        ).share
        if s.pid == MOVING:
            step = R128.add(step, _matrix_times(matrix, part))
            constant = R128.encode(own.constant, MATRIX_DIGITS, LARGEST_ELEMENT)
            step = R128.add(step, constant)
        # So many digits that the ring has no room for larger numbers than promised.
        digits = R128.bits - self.bits
        step = R128.scale(step, 1 << digits - MATRIX_DIGITS)
        step = SharedArray(R128, step, 2, digits, (1 << R128.bits - 1) - 1)
        step = dither(s, step, 1 << digits - 1, by=HELPER)
        return s.open(step, "update", (MOVING,))


def _matrix_times(matrix, vector):
    """A matrix times a vector, in the ring of 128 bits."""
    out = R128.zeros(matrix.shape[:1])
    for k, x in enumerate(vector):
        column = np.ascontiguousarray(matrix[:, k])
        R128.addmul(out, column, np.broadcast_to(x, column.shape).copy())
    return out


def _added_up(array, parts):
    """Sums of the parts of an array in the ring of 128 bits."""
    share = array.share.reshape(parts, -1, 2)
    total = share[0]
    for part in share[1:]:
        total = R128.add(np.ascontiguousarray(total), np.ascontiguousarray(part))
    return SharedArray(R128, total, 2, array.frac_bits, array.bound * parts)


def mismatch(session, count, limits, static=None, moving=None):
    """Whether images hardly match, or less than they did; by a helper that only deals.

    That is so where the sum of squared differences is more than a part of the spread of
    the static image, its squares less their mean, or more than it was and another part.

    Rounds: those of `OwnProducts`, `lift` and `Shares.any_negative`, but that nothing
    is opened.

    Parameters
    ----------
    session : Session
    count : int
        number of voxels.
    limits : (float, float)
        the parts.
    static : array of int64, shape (count,), at the static owner only
        from 0 to 2**`VALUE_BITS`.
    moving : array of int64, shape (2, count), at the moving owner only
        its image as it was and as it is, from 0 to 2**`VALUE_BITS`.

    Returns
    -------
    bit : SharedArray, shape (1,)
    """
    spread = None
    if static is not None:
        spread = np.rint([k * count * np.var(static) for k in limits])
    world, whole = Shares(session), _whole(count)
    spread = world.own(spread, STATIC, (2,), whole).part
    before, after = _squares(session, count, "match", static, moving, 2)
    most, growth = (_number(session, spread, k) for k in range(2))
    tests = [most - after, before + growth - after]
    return world.negative(tests, Digits(1.0, whole.bound))


def show_difference(session, count, static=None, moving=None):
    """Show the moving owner the mean squared difference; by a helper that only deals.

    Rounds: those of `OwnProducts`, `lift` and `Shares.shown`.

    Parameters
    ----------
    session, count, static
        see `mismatch`.
    moving : array of int64, shape (1, count), at the moving owner only

    Returns
    -------
    value : float or None
        in squares of the static image's range.
    """
    sums, most = _squares(session, count, "value", static, moving, 1), _largest(count)
    wanted = Opening(sums, most / _PARTS, most, "final_value", (MOVING,))
    (value,) = Shares(session).shown(wanted)
    return None if value is None else max(float(value[0, 0]), 0.0) / most


def _largest(count):
    """No sum of squares over the voxels is larger."""
    return count * 4.0**VALUE_BITS


def _whole(count):
    """Digits of such sums, and of what is made of some of them."""
    return Digits(1.0, 16 * (_largest(count) + 1))


def _squares(session, count, name, static, moving, images):
    """Sums of squared differences, of some images of the moving owner.

    Rounds: those of `OwnProducts` and `lift`.

    Returns
    -------
    sums : list of Expression, shape (1,)
    """
    world, whole = Shares(session), _whole(count)
    squares = known = None
    if moving is not None:
        squares = (moving**2).sum(axis=1).astype(np.float64)
    if static is not None:
        known = [float((static**2).sum())]
    products = OwnProducts(session, R64, name)
    products.share_static((count,), None if static is None else R64.encode_int(static))
    x = None if moving is None else R64.encode_int(moving)
    sums = products.sums(
        _cross_sums, (images, count), (images,), x, bound=count << 2 * VALUE_BITS
    )
    cross = lift(session, sums).share
    own = world.own(squares, MOVING, (images,), whole).part
    static = _number(session, world.own(known, STATIC, (1,), whole).part, 0)
    return [
        _number(session, own, k) - _number(session, cross, k).times(2) + static
        for k in range(images)
    ]


def _number(session, part, k):
    """One of some numbers on shares."""
    part = None if session.pid == HELPER else part[k : k + 1]
    return expression(Secret(part, 1.0, (1,)))


def _cross_sums(x, y):
    """The form of sums of products with each row."""
    return (x * y).sum(axis=1, dtype=x.dtype)


class SecretProducts:
    """Mean products of two owners' numbers, for the value of the metric.

    Parameters
    ----------
    session : Session
    digits : int
        fraction bits of what is returned.
    """

    def __init__(self, session, digits):
        self.session, self.digits = session, digits
        self._products = OwnProducts(session, R64, "mean-product")

    def share_static(self, count, values=None):
        """Share the static owner's numbers, as those of `SecretSteps`. Rounds: 1."""
        words = None if values is None else R64.encode_int(values)
        self._products.share_static((count,), words)

    def mean(self, count, values=None):
        """The mean product. Rounds: 5. Bytes: 8 for each number.

        Parameters
        ----------
        count : int
        values : array of int64, shape (count,), at the moving owner only

        Returns
        -------
        mean : SharedArray, shape (1,), field P127
        """
        s = self.session
        total = self._products.sums(
            R64.dot,
            (count,),
            (1,),
            None if values is None else R64.encode_int(values),
            bound=count << 2 * VALUE_BITS,
        )
        total = share_owners(s, lift(s, total), 0, P127, "total")
        mean = total.times(round(2.0**COUNT_DIGITS / count))
        digits = COUNT_DIGITS + 2 * VALUE_BITS
        mean = SharedArray(P127, mean.share, 1, digits, 2 << digits)
        return truncate(s, mean, digits - self.digits)
