r"""Squared local correlations of two owners' images and their gradient, on shares.

The static owner knows s(x), the moving owner m(x), which depends on a transform. With
windows of N voxels around the points c of a coarse grid, their covariance
:math:`D_c(s, m) = \frac{1}{N} \sum s m - \frac{1}{N^2} \sum s \sum m`, and the inverse
deviations :math:`e_c = (D_c(s, s) + g^2)^{-1/2}` and f, of m,

.. math::

    \rho_c = D_c(s, m) \, e_c f_c, \qquad F = \frac{1}{C} \sum_c \rho_c^2 .

Every transform moves a voxel by a linear function of its position y, which is public.
So along the k-th of its parameters m changes by :math:`\partial_k m = \sum_{d, e}
K_{k, de} \, y_e(x) \, \partial_d m(x)`, where the matrix K is the moving owner's, and
the slopes :math:`\partial_d m` along the axes of the static image's grid are taken from
central differences: a public linear map. Whatever the number of parameters,

.. math::

    \partial_k F = \frac{2}{C} \Big( \sum_{d, e} K_{k, de} \sum_c \alpha_c
    D_c(s, y_e \partial_d m) - \sum_c \rho_c^2 \, b_{kc} \Big), \quad
    \alpha_c = \rho_c e_c f_c, \quad b_{kc} = f_c^2 D_c(m, \partial_k m),

with b the moving owner's own. Those are the terms of the force of DIPY's `crosscorr`
[1]_, which takes for the factors of all windows around a voxel those of the one that is
centred there.

Elements of 16 bytes on all links, in 3D, with p parameters:

=============================================  =============  ================
step                                           per voxel      per window
=============================================  =============  ================
s and e, once for every level                  1              1
m, f and b                                     1              1 + p
D of m and of its slopes; e f                                 3 (13 + 1)
rho                                                           3
alpha, squares                                                6
**an evaluation**                              **1**          **52 + p**
=============================================  =============  ================

With windows h voxels apart in large grids it is 1 + 64 / h**3 elements a voxel: 144,
54, 32 or 24 bytes with h = 2, 3, 4 or 5. The other order, the force on each voxel first
and then its sums with the slopes of m, takes 4 elements a voxel and some 25 a window:
114 bytes with h = 3, 70 with h = 4, and less only with h = 2.

Rounds: 4, and 3 to bring the sums into the field of the optimizer's numbers
(`SecretCorrelation`). What each party sees is what it sees in `algebra`: uniform
numbers; nothing is opened. `Shares.failures` counts the odds of a wrong rounding, below
2**-36 for the 44 evaluations of a registration in 192 x 224 x 192 voxels; then a step
is wrong, or the value that it is judged by.

.. [1] B. B. Avants et al., "Symmetric diffeomorphic image registration with
   cross-correlation", Medical Image Analysis 12(1), 2008.
"""

import math
from typing import NamedTuple

import numpy as np

from dipy_ppir.mpc.algebra import Clear, Digits, Total, add_into, product
from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.fields import P127, R128
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC
from dipy_ppir.mpc.linear import AxisMap
from dipy_ppir.mpc.protocols import share, share_owners, truncate

#: In units of the image's range, what is added to the deviation of windows: those that
#: are flatter count for hardly anything.
GUARD = 2.0**-6

IMAGE = Digits(2.0**-14, 4.0)
#: e, e f, D and so on; see `Correlations`.
INVERSE = Digits(2.0**-16, 2 / GUARD)
WEIGHT = Digits(2.0**-18, 2 / GUARD**2)
COVARIANCE = Digits(2.0**-28, 8.0)
#: Of slopes times positions, which are numbers of voxels.
SLOPE = Digits(2.0**-26, 2.0**13)
CORRELATION = Digits(2.0**-22, 2.0)
FACTOR = Digits(2.0**-20, 4 / GUARD**2)
SQUARE = Digits(2.0**-24, 4.0)
#: Sums over windows have this unit, and means over them no larger magnitude: of alpha
#: times slopes that is the position over the guard.
SUM_UNIT, LARGEST_MEAN = 2.0**-16, 2.0**14
#: b, the moving owner's.
OWN_SLOPE = Digits(2.0**-16, LARGEST_MEAN)
#: Fraction bits of what sums are multiplied with; no element of the matrix is larger.
MATRIX_DIGITS, LARGEST_ELEMENT = 40, 1 << 13
#: No result is larger.
LARGEST_RESULT = 1 << 21


class Windows:
    """The windows of a grid: around every `spacing`-th voxel, all within the grid.

    Parameters
    ----------
    shape : sequence of int
    radius : int
        voxels; less along an axis that is shorter.
    spacing : int

    Attributes
    ----------
    points : list of array of int
        along each axis, where windows are.
    coarse : tuple of int
        how many.
    size : int
        voxels of one.
    """

    def __init__(self, shape, radius, spacing):
        self.shape = tuple(int(n) for n in shape)
        self.dim = len(self.shape)
        self.reach = [min(radius, (n - 1) // 2) for n in self.shape]
        self.points = []
        for n, r in zip(self.shape, self.reach, strict=True):
            free = n - 1 - 2 * r
            self.points.append(np.arange(r + free % spacing // 2, n - r, spacing))
        self.coarse = tuple(len(p) for p in self.points)
        self.count = math.prod(self.coarse)
        self.size = math.prod(2 * r + 1 for r in self.reach)
        self.sums, self.moments, self.differences = [], [], []
        for n, r, p in zip(self.shape, self.reach, self.points, strict=True):
            at = np.arange(n)
            inside = np.abs(p[:, None] - at) <= r
            self.sums.append(AxisMap(inside, 1.0))
            self.moments.append(AxisMap(inside * (at - n // 2), 1.0))
            central = np.eye(n, k=1) - np.eye(n, k=-1)
            central[[0, -1]] = 0
            self.differences.append(AxisMap(central / 2, 0.5))

    def summed(self, x, apply):
        """Sums over the windows of an array; `apply` is of `AxisMap`."""
        for axis, sums in enumerate(self.sums):
            x = apply(sums, x, axis)
        return x

    def weighed(self, x, apply):
        """Sums of an array times each component of the position, and of the array.

        Returns
        -------
        sums : list of dim + 1 arrays
        """
        first = []
        for axis, (sums, moments) in enumerate(
            zip(self.sums, self.moments, strict=True)
        ):
            first = [apply(sums, y, axis) for y in first]
            first.append(apply(moments, x, axis))
            x = apply(sums, x, axis)
        return [*first, x]

    def covariance(self, x, y):
        """Covariances of two arrays of real numbers within the windows."""
        sums = (self.summed(a, AxisMap.clear) for a in (x * y, x, y))
        both, x, y = (a / self.size for a in sums)
        return both - x * y


class Covariance:
    """Covariance of two images within the windows: a form of `algebra`."""

    def __init__(self, windows):
        self.windows = windows

    def result(self, left, right):
        """Unit and shape of what comes of masked numbers."""
        w = self.windows
        return left[0].unit * right[0].unit / w.size**2, w.coarse

    def clear(self, left, right):
        """Of real numbers."""
        return self.windows.covariance(left[0], right[0])

    def ring(self, left, right, out, factor):
        """Add that of packed arrays, times an integer, to `out`."""
        (x,), (y,), w = left, right, self.windows
        both, x, y = (w.summed(a, AxisMap.ring) for a in (R128.mul(x, y), x, y))
        add_into(out, R128.scale(both, w.size * factor))
        R128.addmul(out, x, y, -factor)


class Slopes:
    """Covariance of an image's slopes, times positions, with another image.

    On the left the image whose slopes they are. What comes is of shape (d (d + 1),
    *windows): along each axis, times each component of the position, and once.
    """

    def __init__(self, windows):
        self.windows = windows

    def result(self, left, right):
        """Unit and shape of what comes of masked numbers."""
        w = self.windows
        unit = left[0].unit * right[0].unit / (2 * w.size**2)
        return unit, (w.dim * (w.dim + 1), *w.coarse)

    def clear(self, left, right):
        """Of real numbers."""
        (x,), (y,), w = left, right, self.windows
        sums, rows = w.summed(y, AxisMap.clear) / w.size, []
        for axis, difference in enumerate(w.differences):
            slope = difference.clear(x, axis)
            both = w.weighed(slope * y, AxisMap.clear)
            alone = w.weighed(slope, AxisMap.clear)
            rows += [(b - a * sums) / w.size for b, a in zip(both, alone, strict=True)]
        return np.stack(rows)

    def ring(self, left, right, out, factor):
        """Add that of packed arrays, times an integer, to `out`."""
        (x,), (y,), w = left, right, self.windows
        sums, rows = w.summed(y, AxisMap.ring), iter(out)
        for axis, difference in enumerate(w.differences):
            slope = difference.ring(x, axis)
            both = w.weighed(R128.mul(slope, y), AxisMap.ring)
            alone = w.weighed(slope, AxisMap.ring)
            for b, a, row in zip(both, alone, rows, strict=False):
                add_into(row, R128.scale(b, w.size * factor))
                R128.addmul(row, a, sums, -factor)


class Rows:
    """Sums over the windows of an array times each of several."""

    def result(self, left, right):
        """Unit and shape of what comes of masked numbers."""
        return left[0].unit * right[0].unit, right[0].shape[:1]

    def clear(self, left, right):
        """Of real numbers."""
        return right[0].reshape(len(right[0]), -1) @ left[0].reshape(-1)

    def ring(self, left, right, out, factor):
        """Add that of packed arrays, times an integer, to `out`."""
        for row, at in zip(right[0], out, strict=True):
            total = R128.dot(R128.flat(left[0]), R128.flat(row))
            add_into(at[None], R128.scale(total, factor))


class Known(NamedTuple):
    """What an owner knows of its image.

    Attributes
    ----------
    image : array, shape of the grid
    inverse : array, shape of the coarse grid
        e, or f; 0 for windows that do not count.
    columns : array, shape (columns, *coarse), or None
        the moving owner's, to be summed with the squares of the correlations: b, and
        whatever else.
    """

    image: np.ndarray
    inverse: np.ndarray
    columns: np.ndarray = None


class Sums(NamedTuple):
    """Sums over the windows: numbers of the world, of unit `SUM_UNIT`.

    Attributes
    ----------
    squares : shape (1,)
        of the squares of the correlations.
    slopes : shape (d (d + 1),), or None
        of alpha times the covariances of slopes.
    columns : shape (columns,), or None
        of the squares times the moving owner's columns.
    """

    squares: object
    slopes: object = None
    columns: object = None


class Correlations:
    """Evaluations on one grid, in a world of `algebra`.

    Parameters
    ----------
    world : Clear or Shares
    windows : Windows
    """

    def __init__(self, world, windows):
        self.world, self.windows = world, windows
        n = windows.size
        # Products of two of these and a sum over N voxels twice: a power of two again.
        self._inverse = INVERSE._replace(
            unit=INVERSE.unit * n / 2.0 ** round(np.log2(n))
        )
        self._covariance, self._slopes = Covariance(windows), Slopes(windows)
        self._static = None

    def share_static(self, known=None):
        """Share what the static owner knows, a `Known`. Rounds: 1."""
        self._static = self.world.given(STATIC, *self._own(known, STATIC))

    def _own(self, known, owner):
        own, w = self.world.own, self.windows
        image, inverse, _ = known or (None,) * 3
        return [
            own(image, owner, w.shape, IMAGE),
            own(inverse, owner, w.coarse, self._inverse),
        ]

    def sums(self, known=None, columns=0):
        """Sums over the windows.

        Rounds: 4. Elements: see the module; without `columns` 10 per window.

        Parameters
        ----------
        known : Known, where the moving image is
        columns : int, optional
            how many there are; public. Without any nothing but the squares is summed.

        Returns
        -------
        sums : Sums
        """
        world, w = self.world, self.windows
        s, e = self._static
        own = self._own(known, MOVING)
        if columns:
            b = None if known is None else known.columns
            own.append(world.own(b, MOVING, (columns, *w.coarse), OWN_SLOPE))
        m, f, *b = world.given(MOVING, *own)
        wanted = [(product(self._covariance, (m,), (s,)), COVARIANCE), (e * f, WEIGHT)]
        if columns:
            wanted.append((product(self._slopes, (m,), (s,)), SLOPE))
        covariance, weight, *slopes = world.fresh(*wanted)
        (rho,) = world.fresh((covariance * weight, CORRELATION))
        squares = self._summed(Total(), rho, rho, 1.0)
        if not columns:
            return Sums(squares)
        alpha, square = world.fresh((rho * weight, FACTOR), (rho * rho, SQUARE))
        return Sums(
            squares,
            self._summed(Rows(), alpha, *slopes, LARGEST_MEAN),
            self._summed(Rows(), square, *b, LARGEST_MEAN),
        )

    def _summed(self, form, x, y, largest):
        digits = Digits(SUM_UNIT, largest * self.windows.count)
        return self.world.secret(product(form, (x,), (y,)), digits)


class Evaluation(NamedTuple):
    """A value and a gradient; on shares `SharedArray` in P127.

    Attributes
    ----------
    value : shape (1,)
        minus the mean of the squared correlations.
    gradient : shape (p,)
    part : shape (1,), or None
        mean over the windows of the squares times the last column.
    """

    value: object
    gradient: object = None
    part: object = None


class SecretCorrelation:
    """Evaluations on shares, as numbers of the optimizer.

    Parameters
    ----------
    session : Session
    world : Shares
        its.
    windows : Windows
    digits : int
        fraction bits of what is returned.
    """

    def __init__(self, session, world, windows, digits):
        self.session, self.windows, self.digits = session, windows, digits
        self._correlations = Correlations(world, windows)

    def share_static(self, known=None):
        """See `Correlations.share_static`."""
        self._correlations.share_static(known)

    def evaluate(self, scale, parameters, known=None, matrix=None, *, part=False):
        """Value and gradient, times `scale`. Rounds: 7.

        Parameters
        ----------
        scale : float
            public.
        parameters : int
            number p of the transform's parameters; public; 0 for the value alone.
        known : Known, at the moving owner only
            with p columns b, and one more if there is a `part`.
        matrix : array, shape (p, d (d + 1)), at the moving owner only
            K.
        part : bool, optional
            whether there is a part; public.

        Returns
        -------
        evaluation : Evaluation
        """
        s, w = self.session, self.windows
        factor, unit = scale / w.count, 2.0**MATRIX_DIGITS
        with s.phase("gradient" if parameters else "value"):
            sums = self._correlations.sums(known, parameters + part)
            if parameters:
                # Not before: the helper would wait for it, and the owners for that.
                shared = self._share_matrix(matrix, factor, parameters)
            squares, *others = self._in_field([x for x in sums if x is not None])
            value = squares.times(-round(factor * unit)).share
            if not parameters:
                return Evaluation(self._scaled(value))
            slopes, columns = others
            moved = shared @ slopes.reshape(-1, 1)
            own = columns[:parameters].times(round(2 * factor * unit))
            gradient = P127.add(moved.share[:, 0], own.share)
            rest = columns[parameters:].times(round(unit / w.count)).share
            whole = self._scaled(np.concatenate([value, gradient, rest]))
        gradient, rest = whole[1 : 1 + parameters], whole[1 + parameters :]
        return Evaluation(whole[:1], gradient, rest if part else None)

    def _share_matrix(self, matrix, factor, parameters):
        dim = self.windows.dim
        return share(
            self.session,
            MOVING,
            None if matrix is None else -2 * factor * np.asarray(matrix),
            (parameters, dim * (dim + 1)),
            frac_bits=MATRIX_DIGITS,
            bound=LARGEST_ELEMENT,
            field=P127,
            name="matrix",
        )

    def _in_field(self, sums):
        """Sums of both owners' parts, in the optimizer's field. Rounds: 1."""
        bound = int(LARGEST_MEAN * self.windows.count / SUM_UNIT)
        digits = round(-math.log2(SUM_UNIT))
        n = sum(math.prod(x.shape) for x in sums)
        part = R128.zeros((n,))
        if self.session.pid != HELPER:
            part = np.concatenate([x.part for x in sums])
        joined = SharedArray(R128, part, 2, digits, bound)
        whole, at = share_owners(self.session, joined, 0, P127), 0
        out = []
        for x in sums:
            out.append(whole[at : at + math.prod(x.shape)])
            at += math.prod(x.shape)
        return out

    def _scaled(self, products):
        """Products of sums with the digits of results. Rounds: 2."""
        digits = MATRIX_DIGITS + round(-math.log2(SUM_UNIT))
        # A line is a parabola too.
        products = SharedArray(P127, products, 2, digits, LARGEST_RESULT << digits)
        return truncate(self.session, products, digits - self.digits)


class ClearCorrelation:
    """What `SecretCorrelation` does, in the clear, rounded where that rounds.

    Parameters
    ----------
    windows : Windows
    digits : int
        fraction bits of what is returned.
    """

    def __init__(self, windows, digits):
        self.windows, self.digits = windows, digits
        self._correlations = Correlations(Clear(), windows)

    def share_static(self, known):
        """See `Correlations.share_static`."""
        self._correlations.share_static(known)

    def evaluate(self, scale, parameters, known, matrix=None, *, part=False):
        """See `SecretCorrelation.evaluate`."""
        factor = scale / self.windows.count
        sums = self._correlations.sums(known, parameters + part)
        value = -_rounded(factor, MATRIX_DIGITS) * sums.squares.part
        if not parameters:
            return Evaluation(_rounded(value, self.digits))
        moved = _rounded(-2 * factor * matrix, MATRIX_DIGITS) @ sums.slopes.part
        own = _rounded(2 * factor, MATRIX_DIGITS) * sums.columns.part[:parameters]
        rest = sums.columns.part[parameters:] / self.windows.count
        found = [_rounded(x, self.digits) for x in (value, moved + own, rest)]
        return Evaluation(*found if part else found[:2])


def _rounded(x, digits):
    return np.rint(np.asarray(x) * 2.0**digits) / 2.0**digits
