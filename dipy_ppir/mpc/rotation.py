r"""The best rotation between two sets of points, each known to one owner.

The owners have n points in turn, x_i the moving and y_i the static owner, about their
centroids and with :math:`\sum |x_i|^2 = \sum |y_i|^2 = 1`. Wanted is the rotation R
that makes :math:`\sum |y_i - R x_i|^2 = 2 - 2 \lambda` least (Arun, Huang and Blostein
1987): that with the largest :math:`\lambda = \mathrm{tr}(R^T B)`,
:math:`B = \sum y_i x_i^T`, never a reflection. With the singular values of B, of which
the last has the sign of its determinant, :math:`\lambda = s_1 + s_2 + s_3 \le 1`.

**In the plane** R has the columns :math:`(c, s)` and :math:`(-s, c)`, and

.. math:: (c, s) = \frac{(a, b)}{\lambda}, \quad \lambda = \sqrt{a^2 + b^2}, \quad
    a = B_{11} + B_{22}, \quad b = B_{21} - B_{12},

with the reciprocal root by Newton's iteration.

**In space** (Markley 1993) with :math:`N = |B|^2`, :math:`D = \det B` and the cofactors
C of B, :math:`\lambda` is the largest root of a polynomial, and R follows:

.. math::

    P(\lambda) &= (\lambda^2 - N)^2 - 8 D \lambda - 4 |C|^2, \\
    \zeta &= P'(\lambda) / 8 = (s_1 + s_2) (s_1 + s_3) (s_2 + s_3), \\
    R &= \tfrac 1 \zeta \left( \tfrac{\lambda^2 + N}{2} B + \lambda C - B B^T B \right).

All roots are real, so that Newton's iteration from 1 comes down to the largest one and
never passes it. It divides by a reciprocal that is carried along,

.. math:: \lambda \leftarrow \lambda - \tfrac 1 8 P y (2 - \zeta y), \quad
    y \leftarrow y (2 - \zeta y),

which is never above :math:`1 / \zeta`, because :math:`\zeta` only falls: steps may be
too short, not too long. There are always `STEPS` of them.

**Whether there is one.** Where :math:`\zeta` is small another rotation fits nearly as
well, as of points on a line or in a ball. Whether it is above `STEADY`, and the last
step no longer than :math:`2^{-10} \zeta`, is opened as one bit; and how well the sets
match (`ALIKE`), as one of three grades, before anything else is. Of sets without a
rotation nothing else is.

==================  ======  ========================================================
step                rounds  bytes, on all links
==================  ======  ========================================================
`correlate`         3       16 d n, and 72 for each of 2 sums, or 9 in space
`in_plane`          13      656, and 112 where sizes count
`in_space`          60      6,784, and 112; 5 comparisons of 44 bits (see `steps`)
`Shares.reached`    2 or 3  64 for each of 2 numbers, or 3 in space, and of 58 bits
                            a comparison; 96 for each of 1 grade, or 2; 16 where sizes
                            count
`Shares.shown`      1       32 for each of 2 numbers, or 6 in space, and receiver
==================  ======  ========================================================

What each party sees before the openings is what `ownproducts`, `protocols.lift` and
`algebra` let it see, all of it uniform: a simulator draws it at random. What is opened
follows from the result, but for the two grades, which are declared.
"""

import math
from typing import NamedTuple

import numpy as np

from dipy_ppir.mpc.algebra import (
    Digits,
    Masked,
    Opening,
    Secret,
    Total,
    add_into,
    expression,
    product,
    summed,
)
from dipy_ppir.mpc.fields import R64, R128
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC, declare
from dipy_ppir.mpc.ownproducts import OwnProducts
from dipy_ppir.mpc.protocols import lift
from dipy_ppir.mpc.worlds import alone, shares

#: Fraction bits of a coordinate: the points' sum of squares is 1.
COORDINATE_BITS = 30
#: Most points, and the bound of sums of products of rounded coordinates.
MOST_POINTS = 1 << 28
_SUMS = (1 << 2 * COORDINATE_BITS) + (1 << 46)
#: Numbers on shares, and reciprocals of zeta.
UNIT, RECIPROCAL_UNIT = 2.0**-40, 2.0**-20
#: Least and largest size of a set, in units that are the caller's, as it is rounded.
SIZES = 1 << 7, 1 << 27
_SIZE, _INVERSE_SIZE = Digits(2.0**-4, 2.0**28), Digits(2.0**-48, 2.0**-6)
_RATIO = Digits(2.0**-14, 2.0**21)
#: Numbers that are compared with thresholds.
_COMPARED = Digits(2.0**-12, 2.0**42)
#: Newton's steps, in the plane and in space.
ROOT_STEPS, STEPS = 3, 12
#: Best line to begin the reciprocal root with between 1/4 and 1; its error is 0.09.
_LINE = 2.12, 19 / 16
#: Least lambda of sets with a rotation, and of sets that match: with the sizes made
#: equal, paired points are half a set's radius apart (root mean square).
LEAST, ALIKE = 1 / 2, 7 / 8
#: The square of that distance over the square of the radius, where sizes are kept.
MOST_APART = 1 / 4
#: Least zeta: as of a rod 90 times as long as it is thick.
STEADY = 2.0**-12
_SETTLED = 1 << 10
#: From which zeta on 1/zeta begins at which value.
_BEGIN = {-11: 9, -9: 7, -7: 5, -5: 3, -3: 1}
_HIGHEST = 2.0**11
#: To what the numbers of a rotation are opened.
PRECISION = 2.0**-18

declare(
    "alike",
    receivers=(MOVING, STATIC, HELPER),
    shape="1, once",
    meaning="whether the two sets of points match in the end, hardly, or not at all",
    bits=math.log2(3),
)
declare(
    "steady",
    receivers=(MOVING, STATIC, HELPER),
    shape="1, once, in 3D",
    meaning="whether no other rotation fits the points nearly as well",
    bits=1,
)
declare(
    "rotation",
    receivers=(MOVING, STATIC),
    shape="2 in 2D, 6 in 3D, once",
    meaning="the rotation, each number to 2^-18",
    bits=21,
)


class Sums:
    """Sums of products of entries of two masked arrays: a form, see `algebra.Product`.

    Parameters
    ----------
    left, right : array of int, shape (..., terms)
        which entries, counted through, are multiplied.
    """

    symmetric = False

    def __init__(self, left, right):
        self.left, self.right = (np.asarray(places) for places in (left, right))

    def result(self, left, right):
        """Unit and shape of what comes of masked numbers."""
        return left[0].unit * right[0].unit, self.left.shape[:-1]

    def clear(self, left, right):
        """Of real numbers."""
        x, y = left[0].reshape(-1), right[0].reshape(-1)
        return (x[self.left] * y[self.right]).sum(-1)

    def ring(self, left, right, out, factor):
        """Add that of packed arrays, times an integer, to `out`."""
        x, y = left[0].reshape(-1, 2), right[0].reshape(-1, 2)
        for j, k in zip(
            np.moveaxis(self.left, -1, 0), np.moveaxis(self.right, -1, 0), strict=True
        ):
            R128.addmul(out, x[j], y[k], factor)

    def factors(self, side, arrays, shape):
        """See `algebra.Product`."""
        yield 0, arrays[0].reshape(-1, 2)[self.right if side else self.left]

    def collect(self, kind, products, out):
        """See `algebra.Product`."""
        for term in np.moveaxis(products, -2, 0):
            add_into(out, np.ascontiguousarray(term))


_I, _J = np.indices((3, 3))


def _place(i, j):
    """Entries of a 3 x 3 matrix, counted through; rows and columns begin anew."""
    return i % 3 * 3 + j % 3


_ROWS = _place(_I[..., None], np.arange(3))
#: A times the transpose of B, A times B, sum of a first row's products.
_BY_ROWS = Sums(_ROWS, _place(_J[..., None], np.arange(3)))
_BY_COLUMNS = Sums(_ROWS, _place(np.arange(3), _J[..., None]))
_FIRST_ROW = Sums([[0, 1, 2]], [[0, 1, 2]])
#: Cofactors are what comes of the first less what comes of the second.
_COFACTORS = (
    Sums(_place(_I + 1, _J + 1)[..., None], _place(_I + 2, _J + 2)[..., None]),
    Sums(_place(_I + 1, _J + 2)[..., None], _place(_I + 2, _J + 1)[..., None]),
)
#: The first two columns of a matrix, times a number.
_COLUMNS = Sums(_place(_I, _J)[:, :2, None], np.zeros((3, 2, 1), int))


class Own(NamedTuple):
    """What an owner puts in: its points about their centroid, see the module.

    Attributes
    ----------
    points : array of int, shape (n, dim)
        in units of ``2**-COORDINATE_BITS``.
    size : float
        root mean square of their distances from the centroid, in units of which there
        are `SIZES`.
    """

    points: np.ndarray
    size: float


class Found(NamedTuple):
    """What was found.

    Attributes
    ----------
    grade : int
        2 for sets that match, 1 for those that hardly do, 0 for those without rotation.
    steady : bool
        whether no other rotation fits nearly as well.
    numbers : array or None
        cosine and sine, shape (2,), or the first two columns, shape (3, 2), at its
        receivers; None elsewhere and where there is none.
    """

    grade: int
    steady: bool
    numbers: np.ndarray


def _sums(x, y):
    """The numbers of B that are used, of the moving and the static owner's points."""
    if x.shape[1] == 2:
        turned = x[:, 0] * y[:, 1] - x[:, 1] * y[:, 0]
        return np.stack([(x * y).sum(dtype=x.dtype), turned.sum(dtype=x.dtype)])
    return (y.T @ x).reshape(-1)


class _Correlation:
    """The numbers of B that are used, of the points of both owners: a form.

    In the plane a and b come of three products a point instead of four.
    """

    symmetric = False

    def result(self, left, right):
        """Unit and shape of what comes of masked numbers."""
        return left[0].unit * right[0].unit, _shape(left[0].shape[1])

    def clear(self, left, right):
        """Of real numbers."""
        return _sums(left[0], right[0]).reshape(_shape(left[0].shape[1]))

    def ring(self, left, right, out, factor):
        """Add that of packed arrays, times an integer, to `out`."""
        sides = (self.factors(k, side, ()) for k, side in enumerate((left, right)))
        for (kind, x), (_, y) in zip(*sides, strict=True):
            products = R128.mul(*map(np.ascontiguousarray, (x, y)))
            self.collect(kind, R128.scale(products, factor), out)

    def factors(self, side, arrays, shape):
        """See `algebra.Product`: a row for each sum, or product of the plane."""
        columns = np.ascontiguousarray(arrays[0].swapaxes(0, 1))
        n, dim = columns.shape[1], len(columns)
        if dim == 2:
            third = (R128.add if side else R128.sub)(*columns)
            yield 0, np.stack([*columns, third])
        else:
            rows = columns[:, None] if side else columns[None]
            yield 0, np.broadcast_to(rows, (dim, dim, n, 2))

    def collect(self, kind, products, out):
        """See `algebra.Product`."""
        rows = products.reshape(-1, *products.shape[-2:])
        sums = np.concatenate([summed(row) for row in rows])
        if len(sums) == 3:
            first, second, third = (sums[k : k + 1] for k in range(3))
            same = R128.add(first, second)
            turned = R128.sub(R128.add(third, second), first)
            sums = np.concatenate([same, turned])
        add_into(out, sums.reshape(out.shape))


def _shape(dim):
    return (2,) if dim == 2 else (3, 3)


def correlate(session, n, dim, points=None):
    """B of the module, or what of it is used in the plane, on shares.

    Rounds: 3. Bytes: 16 per coordinate, and 72 per result, of which the helper sends
    40. Of two owners alone, rounds: 1, bytes: 32 for each of 3 or 9 products a point.

    Parameters
    ----------
    session : Session
    n, dim : int
    points : array of int, shape (n, dim)
        see `Own`; at the owners.

    Returns
    -------
    correlation : Secret, shape (2,) or (3, 3)
    """
    if alone(session):
        return _correlated(shares(session), n, dim, points)
    products = OwnProducts(session, R64, "points")
    words = None if points is None else R64.encode_int(points)
    products.share_static((n, dim), words if session.pid == STATIC else None)
    shape = _shape(dim)
    sums = products.sums(
        _sums,
        (n, dim),
        (math.prod(shape),),
        words if session.pid == MOVING else None,
        bound=_SUMS,
    )
    part = lift(session, sums).share.reshape(*shape, 2)
    unit = 2.0 ** (-2 * COORDINATE_BITS)
    return Secret(None if session.pid == HELPER else part, unit, shape)


def _correlated(world, n, dim, points):
    """See `correlate`: in the language of protocols, of two owners alone."""
    unit, own = 2.0**-COORDINATE_BITS, []
    digits = Digits(unit, 1.0 + unit)
    for owner in (MOVING, STATIC):
        values = points * unit if world.session.pid == owner else None
        own += world.given(owner, world.own(values, owner, (n, dim), digits))
    sums = product(_Correlation(), own[:1], own[1:])
    return world.secret(sums, Digits(0.0, _SUMS * unit**2))


def clear_correlation(moving, static):
    """What `correlate` computes, in the clear."""
    sums = _sums(np.asarray(moving, float), np.asarray(static, float))
    shape = _shape(moving.shape[1])
    unit = 2.0 ** (-2 * COORDINATE_BITS)
    return Secret((sums * unit).reshape(shape), unit, shape)


def _kept(bound, unit=UNIT):
    return Digits(unit, bound)


def _at(x, unit):
    """An expression in a unit that is smaller by a power of two."""
    x = expression(x)
    factor = round(x.unit / unit)
    return x.times(factor).over(factor)


class _Sizes:
    """Whether sets match whose sizes are kept, not made equal.

    With the ratio q of their sizes, the square of the distance over that of the moving
    set's radius is :math:`1 + q^2 - 2 q \\lambda`.
    """

    def __init__(self, world, sizes):
        moving, static = sizes
        inverse = None if moving is None else [1 / moving]
        own = None if static is None else [static]
        self.world = world
        self.mine = [
            (world.own(inverse, MOVING, (1,), _INVERSE_SIZE), _INVERSE_SIZE),
            (world.own(own, STATIC, (1,), _SIZE), _SIZE),
        ]

    def multiply(self, inverse, own):
        """What `fresh` makes a ratio of."""
        return inverse * own, _RATIO

    def compared(self, ratio, similarity):
        """What is to reach what; see `Shares.reached`."""
        return ((ratio * similarity).times(2) - ratio * ratio, 1 - MOST_APART)


def _grades(sizes, ratio, similarity):
    """Groups for `reached`: lambda, and what the sets' match is judged by."""
    alike = (expression(similarity), ALIKE)
    if sizes is not None:
        alike = sizes.compared(ratio, similarity)
    return [((expression(similarity), LEAST), alike)], ["alike"]


def find(world, correlation, sizes, receivers):
    """The best rotation; see the module.

    Parameters
    ----------
    world : Shares or Clear
    correlation : Secret
        of `correlate`.
    sizes : tuple of float or None
        `Own.size` of the moving and the static owner, where this party knows them, if
        they count: None where the sets are scaled to one size.
    receivers : sequence of int
        who is shown the rotation.

    Returns
    -------
    found : Found
    """
    sizes = None if sizes is None else _Sizes(world, sizes)
    solve = in_plane if correlation.shape == (2,) else in_space
    numbers, groups, labels = solve(world, correlation, sizes)
    everybody = MOVING, STATIC, HELPER
    counts = world.reached(
        [(g, label, everybody) for g, label in zip(groups, labels, strict=True)],
        _COMPARED,
    )
    if counts[0] is None:
        # At a helper that deals ahead, for sets that match.
        counts = [2, 1][: len(counts)]
    grade, steady = counts[0], len(counts) < 2 or counts[1] == 1
    if not grade or not steady:
        return Found(grade, steady, None)
    wanted = Opening((numbers,), PRECISION, 1.001, "rotation", tuple(receivers))
    (shown,) = world.shown(wanted)
    return Found(grade, steady, None if shown is None else shown[0])


def in_plane(world, correlation, sizes):
    """Cosine and sine, and what is to be compared; see `find`.

    Returns
    -------
    numbers : Secret
    groups, labels
        for `Shares.reached`.
    """
    own = [] if sizes is None else sizes.mine
    pair, *own = world.fresh((correlation, _kept(1.01)), *own)
    ratio = [] if sizes is None else [sizes.multiply(*own)]
    w, *ratio = world.fresh((product(Total(), (pair,), (pair,)), _kept(1.01)), *ratio)
    constant, slope = _LINE
    (line,) = world.fresh(
        (expression(w).times(round(-16 * slope)).over(16), _kept(8.0))
    )
    y = world.plus(line, constant)
    for _ in range(ROOT_STEPS):
        (square,) = world.fresh((y * y, _kept(64.0)))
        (t,) = world.fresh((w * square, _kept(2.0)))
        three = _at(y, y.unit * t.unit).times(3)
        (y,) = world.fresh(((three - y * t).over(2), _kept(8.0)))
    (similarity,) = world.fresh((w * y, _RATIO._replace(bound=2.0)))
    numbers = world.secret(pair * y, _kept(2.0))
    return numbers, *_grades(sizes, *ratio or [None], similarity)


class _Cubic(NamedTuple):
    """B and what follows of it, masked."""

    b: Masked
    norm: Masked
    cofactors: Masked
    cubic: Masked
    determinant: Masked
    constant: Masked

    def value(self, m, root):
        """P of the module; m the square of the root."""
        square = UNIT * UNIT
        value = m * m - (m * self.norm).times(2) + _at(self.constant, square)
        return value - (root * self.determinant).times(8)

    def slope(self, m, root):
        """Zeta of the module."""
        value = m * root - self.norm * root
        return (value - _at(self.determinant, UNIT * UNIT).times(2)).over(2)

    def rotation(self, m, root):
        """Zeta times R."""
        value = m * self.b + self.norm * self.b + (root * self.cofactors).times(2)
        return (value - _at(self.cubic, UNIT * UNIT).times(2)).over(2)


def in_space(world, correlation, sizes):
    """The first two columns, and what is to be compared; see `in_plane`."""
    own = [] if sizes is None else sizes.mine
    b, *own = world.fresh((correlation, _kept(1.01)), *own)
    ratio = [] if sizes is None else [sizes.multiply(*own)]
    first, second = (product(form, (b,), (b,)) for form in _COFACTORS)
    gram, cofactors, norm, *ratio = world.fresh(
        (product(_BY_ROWS, (b,), (b,)), _kept(1.01)),
        (first - second, _kept(1.01)),
        (product(Total(), (b,), (b,)), _kept(1.01)),
        *ratio,
    )
    total = product(Total(), (cofactors,), (cofactors,))
    cubic, determinant, constant = world.fresh(
        (product(_BY_COLUMNS, (gram,), (b,)), _kept(1.01)),
        (product(_FIRST_ROW, (b,), (cofactors,)), _kept(1.01)),
        (norm * norm - total.times(4), _kept(2.0)),
    )
    of = _Cubic(b, norm, cofactors, cubic, determinant, constant)
    # Zeta at 1, less 1/2.
    begin = (-expression(norm) - expression(determinant).times(2)).over(2)
    y = world.stepped(
        begin,
        [2.0**k - 1 / 2 for k in _BEGIN],
        [_HIGHEST, *(2.0**k for k in _BEGIN.values())],
        _kept(1.0),
        RECIPROCAL_UNIT,
    )
    one = world.own(np.ones(1), MOVING, (1,), _kept(1.0))
    y, root = world.masked(y, one)
    for _ in range(STEPS):
        last = root
        (m,) = world.fresh((root * root, _kept(1.01)))
        value, slope = world.fresh(
            (of.value(m, root), _kept(2.0)), (of.slope(m, root), _kept(1.0))
        )
        done, move = world.fresh((slope * y, _kept(2.0)), (value * y, _kept(8.0)))
        step = (_at(move, UNIT * UNIT).times(2) - move * done).over(8)
        y, root = world.fresh(
            _refined(y, done), (_at(root, step.unit) - step, _kept(1.01))
        )
    (m,) = world.fresh((root * root, _kept(1.01)))
    slope, rotation = world.fresh(
        (of.slope(m, root), _kept(1.0)), (of.rotation(m, root), _kept(1.01))
    )
    coarse = expression(root), _RATIO._replace(bound=2.0)
    done, similarity = world.fresh((slope * y, _kept(2.0)), coarse)
    for _ in range(2):
        (y,) = world.fresh(_refined(y, done))
        (done,) = world.fresh((slope * y, _kept(2.0)))
    numbers = world.secret(product(_COLUMNS, (rotation,), (y,)), _kept(2.0))
    groups, labels = _grades(sizes, *ratio or [None], similarity)
    moved = (expression(last) - root).times(_SETTLED)
    steady = (expression(slope) - moved).over(STEADY), 1.0
    return numbers, [*groups, (steady,)], [*labels, "steady"]


def _refined(y, done):
    """What `fresh` makes a better reciprocal of; done is what it is times zeta."""
    better = _at(y, y.unit * done.unit).times(2) - y * done
    return better, _kept(2.0**24, RECIPROCAL_UNIT)
