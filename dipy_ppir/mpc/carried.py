r"""Two images that are carried along on shares, and their local cross-correlation.

`Carried` is what is common to all metrics; the forces of cross-correlation are in
`CarriedCorrelation`, those of squared differences in `differences`.

SyN moves the static image s and the moving image m towards each other, each by its half
U and V of a map. Within a level nothing is opened: images, halves and what is known of
the windows stay masked. Images and halves are carried along by the small step of an
iteration (`carrier`). What is smooth is kept on a coarse grid C, of every h-th voxel
along each axis.

With windows of N voxels, :math:`\Sigma` their sums (B), and :math:`e = (E + N
g^2)^{-1/2}`, E the sum of squared deviations of s, f the same of m, an iteration is

.. math::

    D &= \tfrac{1}{N} \Sigma s m - \tfrac{1}{N^2} \Sigma s \, \Sigma m, \quad
    w = e f, \quad \rho = N D w \quad \text{at C} \\
    \alpha &= \rho w, \quad p = \rho e, \quad q = \rho f, \quad
    \beta = p^2, \quad \gamma = q^2 \\
    \tau_s &= L(\alpha) (m - \tfrac{1}{N} \Sigma m)
             - L(\beta) (s - \tfrac{1}{N} \Sigma s), \quad
    \tau_m = L(\alpha) (s - \ldots) - L(\gamma) (m - \ldots) \\
    v_a &= K(\tau_s \, \partial_a s), \quad
    c = \lambda / (0.8\, n_8), \quad n_8 = (\textstyle\sum_C |v|^8)^{1/8} \\
    \delta_a &= c v_a + \tfrac{1}{6} \nabla^2 U_a, \quad
    \delta_{ab} = \delta_a \delta_b, \quad \delta_{aa} = \delta_a^2 / 2 \\
    s &\mathrel{+}= \sum_a P(\delta_a) \partial_a s
        + \sum_{ab} L(\delta_{ab}) \partial_{ab} s, \quad
    U_a \mathrel{+}= \delta_a + \text{the same of } U_a

and alike with the images exchanged. :math:`\tau_s` is DIPY's force with its smooth
factors from the coarse grid; L and P interpolate linearly and by cubics from C, K is
DIPY's Gaussian at C of what is not nearer than a radius to the border, :math:`\lambda`
the step length. The second difference does what repeated linear interpolation of its
map does in DIPY, and is what keeps the map smooth. e and f are computed anew at every
few iterations, in their rounds (`CarriedCorrelation._normalizing`). To carry them along
would not do: next to a flat window they jump by a factor of 20 from one coarse point to
the next. In code quantities are scaled by powers of N, so that none depends on it: N D
w, sqrt(N) e, N alpha, and so on.

Elements of 16 bytes of both images together, in 3D (`algebra`: a product masked takes
3):

=========================================  ============  =====================
step                                       per voxel     per point of C
=========================================  ============  =====================
D, w                                                     6
rho                                                      3
alpha, p, q                                              9
beta, gamma                                              6
tau                                        6
v                                                        18
abs(v)**2, its square                                    12
c: 2 norms and rates
delta                                                    18
products of delta                                        36
s, m; U, V                                 6             18
e, f, every fifth time                                   100 / 5
**sum**                                    **12**        **146**
=========================================  ============  =====================

In large grids 12 + 146 / 27 = 17.4 elements or 279 bytes a voxel and iteration with h =
3, 12 + 146 / 8 = 30.3 or 485 with h = 2. The last iteration of a level neither carries
images nor computes e: five iterations take 248 and 426 each. The norms take 4 x 93 x
3.4 kB an iteration besides, from the helper (`steps`). 13 rounds, two of them for the
norm.

Two owners alone (`pairalgebra`) take elementary products instead, and no elements: in
3D 58 a voxel (2 for D, 8 for tau, 12 for v, 36 for s and m) and 162 a point of C, in
the plane 38 and 78, and where e and f are computed anew 4 and 58 more. That is 64 a
voxel and iteration with h = 3, 78 with h = 2. 13 rounds, and those of the norms'
circuits.

What each party sees is what it sees in `algebra`: uniform numbers. A rounding that goes
wrong stays wrong until the end of a level. `Shares.failures` counts the odds, below
2**-25 for a registration of [10, 10, 5] iterations of 192 x 160 x 192 voxels, 2**-21
where images are carried by whole halves; `check` finds out.
"""

from functools import cached_property, reduce
import math
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from dipy_ppir._kernels import carry as kernels
from dipy_ppir.mpc.algebra import (
    Digits,
    Masked,
    Total,
    add_into,
    expression,
    product,
)
from dipy_ppir.mpc.carrier import (
    DERIVATIVE_UNIT,
    DISPLACEMENT,
    FIRST,
    IMAGE,
    SECOND,
    STEP,
    WIDE,
    WIDE_UNIT,
    Carrier,
    channels,
    solid,
    sum_of,
)
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.linear import AxisMap, Linear, along, points
from dipy_ppir.mpc.scratch import scratch
from dipy_ppir.mpc.threads import threads

#: Units of the weights of interpolation and of smoothing, along one axis.
SPREAD_UNIT, SMOOTH_UNIT = 2.0**-8, 2.0**-12
#: Part of the second difference of the whole displacement by which it is smoothed.
ELASTICITY = 1 / 3
#: In units of the image's range, what is added to the deviation of windows: those that
#: are flatter exert hardly any force. With windows of small radius twice as much.
GUARD, GUARD_SMALL, SMALL_RADIUS = 2.0**-6, 2.0**-5, 2
#: Planes of an image whose products with its gradient are smoothed at a time.
PLANES = 8
#: A longest step is some 0.8 times the norm.
NORM_PART = 0.8
#: The deviation of a window is in part that of one whose radius is so much larger: it
#: knows of an edge before that comes into the window.
REACH, AROUND = 2, 0.125

#: sqrt(N) e, N e f, rho, and so on; see `CarriedCorrelation`.
INVERSE = Digits(2.0**-12, 2.0**8)
WEIGHT = Digits(2.0**-12, 2.0**15)
COVARIANCE = Digits(2.0**-30, 8.0)
CORRELATION = Digits(2.0**-16, 4.0)
SLOPE = Digits(2.0**-14, 2.0**8)
FACTOR = Digits(2.0**-12, 2.0**14)
FORCE = Digits(2.0**-16, 2.0**8)
SPEED = Digits(2.0**-16, 2.0**5)
SQUARE = Digits(2.0**-24, 2.0**10)
FOURTH = Digits(2.0**-32, 2.0**16)
EIGHTH = Digits(0.0, 2.0**36)
VARIANCE = Digits(2.0**-28, 2.0)
RECIPROCAL = Digits(2.0**-10, 2.0**15)
RATIO = Digits(2.0**-16, 2.0**6)
NORM = Digits(2.0**-20, 2.0**4)
WHOLE = Digits(2.0**-16, 2.0)
#: Coefficients of polynomials that bring t = y sqrt(R) nearer to 1, the best of their
#: degree one after the other: first t = a x + b x**3 with x = sqrt(R) between 2**-6 and
#: 5/4, then t <- a t + b t**3 + c t**5: to at least 0.06, 0.23, 0.64 and 0.97, and as
#: much above 1 at most. See Amsel et al., "The Polar Express" (2025).
NEAR = 4094 / 1024, -2582 / 1024
NEARER = tuple(
    tuple(c / 1024 for c in row)
    for row in ((3849, -2871, 557), (2934, -2190, 481), (2072, -1439, 399))
)
COEFFICIENT = 2.0**-10
#: The same of g**2.
FINE = 2.0**-20
#: Unit of a step before it is rounded, in steps.
BEND_UNIT = 2.0**-14
MOST_RATE = 2.0**6


def taps_along(taps, n):
    """Correlation with an odd number of taps, edges repeated, as a matrix."""
    matrix, reach = np.zeros((n, n)), len(taps) // 2
    i = np.arange(n)
    for k, w in enumerate(taps):
        np.add.at(matrix, (i, np.clip(i + k - reach, 0, n - 1)), w)
    return matrix


def cubic(n, p):
    """Interpolation of n voxels from points p by cubics through the nearest four."""
    k = min(4, len(p))
    matrix = np.zeros((n, len(p)))
    for i in range(n):
        at = np.clip(np.searchsorted(p, i, side="right") - k // 2, 0, len(p) - k)
        near = p[at : at + k]
        for j in range(k):
            others = np.delete(near, j)
            matrix[i, at + j] = np.prod((i - others) / (near[j] - others))
    return matrix


def slope(p, order):
    """Derivative at points p of the polynomials through neighbours, as a matrix.

    Through five points, next to the border through three, as many on either side: where
    more lie on one side, what is carried along may grow without bounds.
    """
    last = len(p) - 1
    matrix = np.zeros((len(p), len(p)))
    for i, x in enumerate(p):
        reach = min(max(min(i, last - i), 1), 2)
        near = np.clip(np.arange(i - reach, i + reach + 1), 0, last)
        near = np.unique(near)
        if len(near) > order:
            powers = np.vander(p[near] - float(x), increasing=True)
            matrix[i, near] = np.linalg.inv(powers)[order] * math.factorial(order)
    return matrix


def interpolation(wanted, p):
    """Linear interpolation at some positions from points p, as a matrix."""
    return np.stack([np.interp(wanted, p, row) for row in np.eye(len(p))], 1)


def straight(n, p):
    """Linear interpolation of n voxels from points p, as a matrix."""
    return interpolation(np.arange(n), p)


class Residual:
    """N times what an image differs from the mean of its window: a linear map."""

    def __init__(self, operators):
        self.o = operators
        self.unit = 1 / operators.window

    def shape(self, shape):
        """Shape of the output."""
        return shape

    def clear(self, x):
        """Of real numbers: the difference itself."""
        return x - self.o.box.clear(x) / self.o.window

    def ring(self, x):
        """Of packed elements."""
        sums, whole = self.o.box.ring(x), scratch("residual", self.o.shape)
        R128.kernels.scale(R128.flat(x), self.o.window, R128.flat(whole))
        R128.kernels.sub(R128.flat(whole), R128.flat(sums), R128.flat(sums))
        return sums


class Box:
    """Sums over windows of radius r, cut off at the borders, at all or some voxels."""

    unit = 1.0

    def __init__(self, shape, radius, points=None):
        self._radius, self._points = radius, points
        self._matrices = []
        for n in shape:
            i = np.arange(n)
            self._matrices.append((np.abs(i[:, None] - i) <= radius).astype(np.float64))
        if points is not None:
            self._matrices = [m[p] for m, p in zip(self._matrices, points, strict=True)]

    def clear(self, x):
        """Of real numbers."""
        for axis, matrix in enumerate(self._matrices):
            x = along(x, matrix, axis)
        return x

    def ring(self, x):
        """Of packed elements."""
        shape = list(x.shape[:-1])
        for axis in reversed(range(len(shape))):
            outer, n = int(np.prod(shape[:axis])), shape[axis]
            inner = 2 * int(np.prod(shape[axis + 1 :]))
            out = scratch(f"box-{axis}", shape) if axis else R128.empty(shape)
            flat = np.ascontiguousarray(x).reshape(outer, n, inner)
            R128.kernels.box(
                flat, self._radius, 0, out.reshape(outer, n, inner), threads()
            )
            x = out
            if self._points is not None:
                x = np.take(x, self._points[axis], axis=axis)
                shape[axis] = len(self._points[axis])
        return x


class Operators:
    """The public linear maps of one level's grid.

    Parameters
    ----------
    shape : sequence of int
    radius : int
        of the windows, voxels.
    sigma : float
        of the Gaussian that smooths steps, voxels.
    spacing : sequence of int
        of the coarse grid, along each axis, voxels.
    relative : sequence of float, optional
        what a step along each axis counts; for voxels that are not cubes.
    thinning : sequence of int, optional
        every how many voxels along each axis are carried: the arguments count the
        voxels that there were before, and all else those that are left.
    """

    def __init__(self, shape, radius, sigma, spacing, relative=None, thinning=None):
        whole = [int(n) for n in shape]
        thinning = (1,) * len(whole) if thinning is None else thinning
        thinning = [int(t) for t in thinning]
        self.shape = tuple(-(-n // t) for n, t in zip(whole, thinning, strict=True))
        self.dim, self.radius = len(self.shape), radius
        self.sigmas = [sigma / t for t in thinning]
        self.window = (2 * radius + 1) ** self.dim
        self.guard = GUARD if radius > SMALL_RADIUS else GUARD_SMALL
        self.spacing = tuple(spacing)
        self.points = [
            points(n, h) if t == 1 else points(n, h) / t
            for n, h, t in zip(whole, spacing, thinning, strict=True)
        ]
        self.coarse = tuple(len(p) for p in self.points)
        self.relative = (1.0,) * self.dim if relative is None else tuple(relative)
        self.keys = [(a,) for a in range(self.dim)]
        self.keys += [(a, b) for a in range(self.dim) for b in range(a, self.dim)]

    def _axes(self, make, unit, **options):
        each = zip(self.shape, self.points, strict=True)
        return Linear([AxisMap(make(n, p), unit, **options) for n, p in each])

    @cached_property
    def box(self):
        """Window sums."""
        return Box(self.shape, self.radius)

    @cached_property
    def residual(self):
        """What an image differs from the mean of its window."""
        return Residual(self)

    @cached_property
    def cubic(self):
        """From the coarse grid to all voxels."""
        return self._axes(cubic, SPREAD_UNIT, sums=True)

    @cached_property
    def straight(self):
        """From the coarse grid to all voxels, linearly."""
        return self._axes(straight, SPREAD_UNIT, sums=True)

    @cached_property
    def smooth(self):
        """Gaussian at the coarse points, for each axis of a step.

        Of what is nearer than a radius to the border nothing is taken, and at the
        border nothing comes.
        """
        axes = []
        for n, p, sigma in zip(self.shape, self.points, self.sigmas, strict=True):
            gauss = ndimage.gaussian_filter1d(np.eye(n), sigma, axis=0)
            gauss = interpolation(p, np.arange(n)) @ gauss
            inner = np.zeros(n)
            inner[self.radius : n - self.radius] = 1
            outer = np.zeros(len(p))
            outer[1:-1] = 1
            axes.append(gauss * inner * outer[:, None])
        return [
            Linear(
                [
                    AxisMap(m * self.relative[a] if b == 0 else m, SMOOTH_UNIT)
                    for b, m in enumerate(axes)
                ]
            )
            for a in range(self.dim)
        ]

    @cached_property
    def bend(self):
        """Half the elasticity times the second difference, for each axis."""
        mask = np.zeros(self.coarse, dtype=bool)
        mask[(slice(1, -1),) * self.dim] = True
        maps = []
        for a, p in enumerate(self.points):
            matrix = np.zeros((len(p), len(p)))
            for i in range(1, len(p) - 1):
                h, k = p[i] - p[i - 1], p[i + 1] - p[i]
                matrix[i, i - 1], matrix[i, i + 1] = (
                    2 / (h * (h + k)),
                    2 / (k * (h + k)),
                )
                matrix[i, i] = -matrix[i, i - 1] - matrix[i, i + 1]
            axes = [None] * self.dim
            axes[a] = AxisMap(matrix * ELASTICITY / 2, BEND_UNIT)
            maps.append(Linear(axes, mask))
        return maps

    @cached_property
    def slopes(self):
        """Derivatives on the coarse grid, by key: (a,) or (a, b)."""
        unit = 2.0**-24 * 2.0**-18 / STEP.unit
        first, second = ([slope(p, k) for p in self.points] for k in (1, 2))
        maps = {}
        for key in self.keys:
            axes = [None] * self.dim
            if len(key) == 1:
                axes[key[0]] = AxisMap(first[key[0]], unit)
            elif key[0] == key[1]:
                axes[key[0]] = AxisMap(second[key[0]], unit)
            else:
                for a in key:
                    axes[a] = AxisMap(first[a], unit**0.5)
            maps[key] = Linear(axes)
        return maps

    def derivatives(self, wide=False):
        """Derivatives of images by key; see `Carry`."""
        maps = {}
        for key in self.keys:
            axes = [None] * self.dim
            if len(key) == 2 and key[0] == key[1]:
                matrix = taps_along(SECOND, self.shape[key[0]])
                axes[key[0]] = AxisMap(matrix * DERIVATIVE_UNIT, DERIVATIVE_UNIT)
            else:
                taps, unit = (WIDE, WIDE_UNIT) if wide else (FIRST, DERIVATIVE_UNIT)
                for a in key:
                    axes[a] = AxisMap(taps_along(taps, self.shape[a]) * unit, unit)
            maps[key] = Linear(axes)
        return maps

    @cached_property
    def inner(self):
        """Whether the window of a coarse point lies inside the grid."""
        r = self.radius
        inside = [
            (p >= r) & (p < n - r) for n, p in zip(self.shape, self.points, strict=True)
        ]
        return reduce(np.multiply.outer, inside)

    def _bands(self, linear):
        flat = [(np.zeros(1, np.int64), np.ones((1, 1), np.int32))] * (3 - self.dim)
        bands = [*flat, *(a.band for a in linear.axes)]
        return kernels.Bands(bands, (1,) * (3 - self.dim) + self.coarse)

    @cached_property
    def cubic_bands(self):
        """`cubic` as the kernels take it."""
        return self._bands(self.cubic)

    @cached_property
    def straight_bands(self):
        """`straight` as the kernels take it."""
        return self._bands(self.straight)

    @cached_property
    def codes(self):
        """The kernels' codes of `keys`."""
        first = 3 - self.dim
        return [kernels.CODES[tuple(a + first for a in key)] for key in self.keys]


# -- forms -----------------------------------------------------------------------


class Window:
    """Covariance within windows, at the coarse points.

    Parameters
    ----------
    operators : Operators
    wider : int, optional
        by how much the radius is larger than theirs.
    """

    symmetric = True

    def __init__(self, operators, wider=0):
        self.o, radius = operators, operators.radius + wider
        self.box = Box(operators.shape, radius, operators.points)
        self.size = (2 * radius + 1) ** operators.dim

    def result(self, left, right):
        """Unit and shape of what comes of masked numbers."""
        return left[0].unit * right[0].unit / self.size**2, self.o.coarse

    def clear(self, left, right):
        """Of real numbers."""
        (x,), (y,), n, box = left, right, self.size, self.box.clear
        return box(x * y) / n - box(x) * box(y) / n**2

    def ring(self, left, right, out, factor):
        """Add that of packed arrays, times an integer, to `out`."""
        (x,), (y,), box = left, right, self.box.ring
        products = scratch("window", self.o.shape)
        products[...] = 0
        R128.addmul(products, x, y)
        R128.addmul(out, box(x), box(y), -factor)
        sums = R128.scale(box(products), self.size * factor)
        add_into(out, sums)

    def factors(self, side, arrays, shape):
        """See `algebra.Product`: the array, and its sums over the windows."""
        yield 0, arrays[0]
        yield 1, self.box.ring(arrays[0])

    def collect(self, kind, products, out):
        """See `algebra.Product`."""
        sums = products if kind else self.box.ring(products)
        add_into(out, R128.scale(sums, -1 if kind else self.size))


class Spread:
    """A coarse field, interpolated linearly, times an array at every voxel."""

    symmetric = False

    def __init__(self, operators):
        self.o = operators

    def result(self, left, right):
        """Unit and shape of what comes of masked numbers."""
        return left[0].unit * right[0].unit * self.o.straight.unit, self.o.shape

    def clear(self, left, right):
        """Of real numbers."""
        return self.o.straight.clear(left[0]) * right[0]

    def ring(self, left, right, out, factor):
        """Add that of packed arrays, times an integer, to `out`."""
        field, y, out = solid(left[0]), solid(right[0]), solid(out)
        kernels.spread(field, self.o.straight_bands, y, factor, out, threads())

    def factors(self, side, arrays, shape):
        """See `algebra.Product`."""
        yield 0, arrays[0] if side else self.o.straight.ring(arrays[0])

    def collect(self, kind, products, out):
        """See `algebra.Product`."""
        add_into(out, products)


class Smooth:
    """An array times the gradient of an image along an axis, smoothed.

    Of arrays of several channels the sum over them.
    """

    symmetric = False

    def __init__(self, operators, axis):
        self.o, self.axis = operators, axis
        self.map = operators.smooth[axis]

    def result(self, left, right):
        """Unit and shape of what comes of masked numbers."""
        return left[0].unit * right[0].unit / 2 * self.map.unit, self.o.coarse

    def clear(self, left, right):
        """Of real numbers."""
        axis = self.axis - self.o.dim
        slope = np.gradient(right[0], axis=axis)
        np.moveaxis(slope, axis, 0)[[0, -1]] = 0
        products = (left[0] * slope).reshape(-1, *self.o.shape)
        return self.map.clear(products.sum(axis=0))

    def ring(self, left, right, out, factor):
        """Add that of packed arrays, times an integer, to `out`."""
        first, shape = 3 - self.o.dim, self.o.shape
        t, x = channels(left[0], shape), channels(right[0], shape)
        axes = [None] * first + self.map.axes
        n0, n1, n2, _ = t[0].shape
        thin = scratch("thin", (n0, *self.o.coarse[-2:]))
        for begin in range(0, n0, PLANES):
            planes = min(PLANES, n0 - begin)
            products = scratch("smooth", (planes, n1, n2))
            products[...] = 0
            for y, z in zip(t, x, strict=True):
                kernels.slope_products(
                    y, z, self.axis + first, begin, products, threads()
                )
            rows = axes[1].ring(products, 1)
            thin[begin : begin + planes] = axes[2].ring(rows, 2)
        if axes[0] is not None:
            thin = axes[0].ring(thin, 0)
        add_into(out, R128.scale(thin.reshape(out.shape), factor))

    def factors(self, side, arrays, shape):
        """See `algebra.Product`: the array, and differences of neighbours."""
        x = arrays[0].reshape(-1, *self.o.shape, 2)
        if not side:
            yield 0, x
            return
        rows = np.moveaxis(x, self.axis + 1, 0)
        slope = np.zeros_like(rows)
        later, earlier = (np.ascontiguousarray(k) for k in (rows[2:], rows[:-2]))
        slope[1:-1] = R128.sub(later, earlier)
        yield 0, np.moveaxis(slope, 0, self.axis + 1)

    def collect(self, kind, products, out):
        """See `algebra.Product`."""
        whole = R128.zeros(self.o.shape)
        for channel in products:
            add_into(whole, channel)
        add_into(out, self.map.ring(whole))


# -- the protocol ------------------------------------------------------------------


class Half(NamedTuple):
    """One image and its half of the map, carried along.

    Attributes
    ----------
    image : Masked, shape of the grid
        or of channels on it.
    inverse : Masked, coarse, or None
        sqrt(N) e, with cross-correlation.
    displacement : list of Masked, coarse
        voxels.
    """

    image: Masked
    inverse: Masked
    displacement: list


class Start(NamedTuple):
    """What the owner of an image knows of it at the start of a level.

    Attributes
    ----------
    image : array of float, shape of the grid
        or of channels on it; warped, between 0 and 1.
    displacement : array of float, shape (dim, coarse)
        by which it was warped, voxels.
    """

    image: np.ndarray
    displacement: np.ndarray


class Beside:
    """Computes something in the rounds of something else.

    Parameters
    ----------
    world : Clear or Shares
    rounds : generator
        yields what it wants to be made fresh, is sent what became of it, and returns
        its result.

    Attributes
    ----------
    result : object
        None until there were as many rounds as it takes.
    """

    def __init__(self, world, rounds):
        self.world, self.rounds, self.result = world, rounds, None
        self.wanted = next(rounds)

    def fresh(self, *wanted):
        """What the world makes of expressions; and one round more of the other."""
        fresh = self.world.fresh(*wanted, *self.wanted)
        if self.wanted:
            try:
                self.wanted = self.rounds.send(fresh[len(wanted) :])
            except StopIteration as end:
                self.wanted, self.result = [], end.value
        return fresh[: len(wanted)]

    def finished(self):
        """The result, in rounds of its own."""
        while self.wanted:
            self.fresh()
        return self.result


class Carried:
    """Iterations of SyN at one level; see the module.

    What a metric adds: the forces (`speeds`), what the sum that they make larger or
    smaller is compared with (`reference`), and what is known of an image besides.

    Parameters
    ----------
    world : Clear or Shares
    operators : Operators
    step : float
        length of the longest step, voxels.
    channels : tuple of int, optional
        shape of what each voxel of an image has; numbers by default.

    Attributes
    ----------
    better : int
        1 where images match better the larger their score, else -1.
    terms : int
        how many numbers the score is a sum of, none of them much larger than 1.
    """

    def __init__(self, world, operators, step, channels=()):
        self.world, self.o, self.step = world, operators, step
        self.shape = (*channels, *operators.shape)
        self.smooth = [Smooth(operators, a) for a in range(operators.dim)]
        self.carrier = Carrier(world, operators)

    # -- what a metric adds ----------------------------------------------

    def speeds(self, static, moving, fresh=None):
        """Smoothed forces on both images, per voxel, at the coarse points.

        Parameters
        ----------
        static, moving : Half
        fresh : callable, optional
            what makes expressions fresh; by default the world does.

        Returns
        -------
        speeds : list of Masked
            those of the static image along each axis, then those of the moving image.
        score : Expression or Secret
            see `iterate`.
        """
        raise NotImplementedError

    def reference(self, halves):
        """What the score is compared with to see whether the images match.

        Parameters
        ----------
        halves : sequence of Half
            as they were given to `iterate`.

        Returns
        -------
        reference : Expression, shape (1,)
        """
        raise NotImplementedError

    def _normalizing(self, images):
        """What is known of images besides, for `Beside`: nothing."""
        yield []

    def _known(self, half):
        """Numbers of `_normalizing`, and their digits, for `check`."""
        return []

    # -- the start of a level --------------------------------------------

    def begin(self, starts, displacements=None, steps=None):
        """Share what each owner knows at the start of a level.

        Rounds: 1, and those of `_normalizing`; where images are carried before, 3 or
        what `_transported` takes.

        Parameters
        ----------
        starts : dict
            maps each owner to a `Start`, or to None where it is not known.
        displacements : dict, optional
            maps each owner to its half of the map, list of Masked, at the coarse
            points; zero by default. The images are carried by what it differs from
            what they were warped by.
        steps : tuple of int, optional
            where that may be many voxels, in how many steps: see `_transported`.

        Returns
        -------
        halves : dict
            maps each owner to a `Half`.
        """
        halves = self._shared(starts, displacements)
        if steps is not None:
            halves = self._transported(halves, *steps)
        elif displacements is not None:
            halves = self._adjusted(halves, starts)
        images = [half.image for half in halves.values()]
        beside = Beside(self.world, self._normalizing(images))
        inverses = beside.finished() or [None] * len(images)
        each = zip(halves.items(), inverses, strict=True)
        return {owner: half._replace(inverse=x) for (owner, half), x in each}

    def _shared(self, starts, displacements):
        w, o, own = self.world, self.o, []
        for owner, start in starts.items():
            image = None if start is None else start.image
            own.append(w.own(image, owner, self.shape, IMAGE))
        if displacements is None:
            zero = np.zeros(o.coarse)
            own += [
                w.own(None if start is None else zero, owner, o.coarse, DISPLACEMENT)
                for owner, start in starts.items()
                for _ in range(o.dim)
            ]
        own = iter(w.masked(*own))
        halves = {owner: Half(next(own), None, None) for owner in starts}
        if displacements is None:
            displacements = {
                owner: [next(own) for _ in range(o.dim)] for owner in starts
            }
        return {
            owner: half._replace(displacement=displacements[owner])
            for owner, half in halves.items()
        }

    def _adjusted(self, halves, starts):
        """Images carried by what their halves differ from those they were warped by.

        Rounds: 3.
        """
        w, o, steps = self.world, self.o, []
        for owner, start in starts.items():
            for a, u in enumerate(halves[owner].displacement):
                known = None if start is None else start.displacement[a]
                known = w.own(
                    known, owner, o.coarse, Digits(u.unit, DISPLACEMENT.bound)
                )
                steps.append((expression(u) - known, STEP))
        return self._moved(halves, self._moves(w.fresh(*steps)))

    def _transported(self, halves, times, parts):
        """Images, that were not warped, carried by their halves of the map.

        Rounds: for each time 4 and the number of parts. Elements of both images in 3D:
        6 per voxel, channel, time and part; 120 per point of the coarse grid and time.

        Parameters
        ----------
        halves : dict
        times, parts : int
            in how many steps, see `Carrier.advancing`; powers of two.
        """
        each = [
            self.carrier.advancing(half.displacement, times, parts)
            for half in halves.values()
        ]
        for both in zip(*each, strict=True):
            steps = [(x, STEP) for step in both for x in step]
            moves = self._moves(self.world.fresh(*steps))
            for _ in range(parts):
                halves = self._moved(halves, moves, wide=True)
        return halves

    def _moved(self, halves, moves, wide=False):
        """Halves with images carried along by moves. Rounds: 1."""
        each = zip(halves.values(), moves, strict=True)
        wanted = [self.carrier.image(move, half.image, wide) for half, move in each]
        images = zip(halves.items(), self.world.fresh(*wanted), strict=True)
        return {owner: half._replace(image=x) for (owner, half), x in images}

    # -- one iteration ---------------------------------------------------

    def iterate(self, static, moving, *, refine=False, last=False):
        """One iteration.

        Parameters
        ----------
        static, moving : Half
        refine : bool, optional
            whether to compute what is known of the images besides anew, of the images
            as they are given; see `_normalizing`.
        last : bool, optional
            whether nothing but the displacements will be needed.

        Returns
        -------
        halves : list of Half
        score : Expression or Secret, shape (1,)
            how well the images match, as they are given: see `better`.
        """
        w, o, halves = self.world, self.o, (static, moving)
        rounds = self._normalizing([static.image, moving.image]) if refine else idle()
        beside = Beside(w, rounds)
        speeds, score = self.speeds(static, moving, beside.fresh)
        rates = self.rates(speeds, beside.fresh)
        steps = []
        for k, half in enumerate(halves):
            for a in range(o.dim):
                step = speeds[k * o.dim + a] * rates[k]
                for bend in o.bend:
                    step = step + w.map(bend, half.displacement[a])
                steps.append((step, STEP))
        moves = self._moves(beside.fresh(*steps), beside.fresh)
        wanted = []
        for half, move in zip(halves, moves, strict=True):
            if not last:
                wanted.append(self.carrier.image(move, half.image))
            for u, step in zip(half.displacement, move, strict=False):
                change = self.carrier.change(move, u)
                wanted.append((change, DISPLACEMENT, (u, step)))
        fresh = beside.fresh(*wanted)
        inverses = beside.result or [half.inverse for half in halves]
        each, out = len(fresh) // 2, []
        for k in range(2):
            mine = fresh[k * each : (k + 1) * each]
            image = None if last else mine[0]
            out.append(Half(image, inverses[k], mine[-o.dim :]))
        return out, score

    def rates(self, speeds, fresh=None):
        """By what to multiply each image's speeds for the longest step to be right.

        Rounds: 4, the first two of which are `fresh`; see `speeds`.
        """
        w, dim, fresh = self.world, self.o.dim, fresh or self.world.fresh
        squares = fresh(
            *(
                (sum_of(v * v for v in speeds[k : k + dim]), SQUARE)
                for k in range(0, len(speeds), dim)
            )
        )
        fourths = fresh(*((x * x, FOURTH) for x in squares))
        eighths = [w.secret(product(Total(), (x,), (x,)), EIGHTH) for x in fourths]
        digits = Digits(BEND_UNIT * STEP.unit / speeds[0].unit, MOST_RATE)
        return w.rates(eighths, self.step / NORM_PART, 8, digits)

    def check(self, before, halves):
        """Raise RoundingError if a rounding went wrong; see `Shares.check`.

        Parameters
        ----------
        before, halves : sequence of Half
            before and after the last iteration, which does not carry the images.
        """
        numbers = []
        for half in before:
            numbers.append((half.image, IMAGE))
            numbers += self._known(half)
        for half in halves:
            numbers += [(u, DISPLACEMENT) for u in half.displacement]
        self.world.check(*numbers)

    def _moves(self, steps, fresh=None):
        """Moves of the steps of both images. Rounds: 1."""
        dim, fresh = self.o.dim, fresh or self.world.fresh
        steps = [steps[:dim], steps[dim:]]
        products = fresh(
            *((x, STEP) for step in steps for x in self.carrier.products(step))
        )
        each = len(products) // 2
        return [[*steps[k], *products[k * each : (k + 1) * each]] for k in range(2)]


class CarriedCorrelation(Carried):
    """Iterations with cross-correlation.

    The score is the sum of the squared local correlations at the coarse points.

    Parameters
    ----------
    world, operators, step
        see `Carried`.
    """

    better = 1

    def __init__(self, world, operators, step):
        super().__init__(world, operators, step)
        self.window, self.spread = Window(operators), Spread(operators)
        self.wider = Window(operators, REACH)
        self.terms = math.prod(operators.coarse)
        n = operators.window
        # Products of two of these and a sum over N voxels twice: a power of two again.
        self.inverse = INVERSE._replace(
            unit=INVERSE.unit * n / 2.0 ** round(np.log2(n))
        )
        self._inner = Linear([None] * operators.dim, operators.inner)

    def _normalizing(self, images):
        """Inverse norms sqrt(N) e of images, from nothing but them: for `Beside`.

        With R = E / N + g**2, polynomials y(R) such that y sqrt(R) comes closer and
        closer to 1, wherever it begins; see `NEARER`.

        Rounds: 11. Elements: 50 per image and point of the coarse grid.
        """
        w, (first, slope) = self.world, NEAR
        wanted = []
        for x in images:
            unit = self.window.result((x,), (x,))[0] * COEFFICIENT
            near = product(self.window, (x,), (x,)).weighted(1 - AROUND, unit)
            around = product(self.wider, (x,), (x,)).weighted(AROUND, unit)
            wanted.append((near + around, VARIANCE))
        variances = yield wanted
        variances = [w.plus(r, self.o.guard**2) for r in variances]
        unit = self.inverse.unit * RATIO.unit * COEFFICIENT
        found = yield [
            (expression(r).weighted(slope, unit), self.inverse) for r in variances
        ]
        found = [w.plus(y, first) for y in found]
        for a, b, c in NEARER:
            n = len(found)
            each = list(zip(found, variances, strict=True))
            fresh = yield [
                *((y * y, RECIPROCAL) for y in found),
                *((y * r, NORM) for y, r in each),
            ]
            squares, norms = fresh[:n], fresh[n:]
            fresh = yield [
                *((y * x, RATIO) for y, x in zip(found, norms, strict=True)),
                *((q * x, self.inverse) for q, x in zip(squares, norms, strict=True)),
            ]
            ratios, cubes = fresh[:n], fresh[n:]
            found = yield [
                (
                    expression(y).weighted(a, unit)
                    + expression(x).weighted(b, unit)
                    + (x * z).weighted(c, unit),
                    self.inverse,
                )
                for y, x, z in zip(found, cubes, ratios, strict=True)
            ]
        return found

    def _known(self, half):
        return [(half.inverse, self.inverse)]

    def speeds(self, static, moving, fresh=None):
        """Smoothed forces on both images, times N; see `Carried`. Rounds: 6."""
        w, fresh = self.world, fresh or self.world.fresh
        s, m, e, f = static.image, moving.image, static.inverse, moving.inverse
        covariance, weight = fresh(
            (product(self.window, (s,), (m,)), COVARIANCE), (e * f, WEIGHT)
        )
        (rho,) = fresh((covariance * weight, CORRELATION))
        alpha, p, q = fresh((rho * weight, FACTOR), (rho * e, SLOPE), (rho * f, SLOPE))
        beta, gamma = fresh((p * p, FACTOR), (q * q, FACTOR))
        forces = fresh(*self._forces(s, m, alpha, beta, gamma))
        speeds = fresh(
            *(
                (product(form, (force,), (x,)), SPEED)
                for force, x in zip(forces, (s, m), strict=True)
                for form in self.smooth
            )
        )
        inner = w.map(self._inner, rho)
        score = product(Total(), (inner,), (inner,))
        most = CORRELATION.bound**2 * self.terms
        return speeds, w.settled(score, Digits(0.0, most))

    def reference(self, halves):
        """What the sum of squared correlations would be if the images matched.

        Of two windows with the same pattern :math:`\\rho^2` is :math:`(1 - g^2 y^2)(1 -
        g^2 z^2)`, y and z their inverse norms: 1, but for what is flat.

        Rounds: 1. Elements: 6 per point of the coarse grid.

        Parameters
        ----------
        halves : sequence of Half

        Returns
        -------
        reference : Expression, shape (1,)
        """
        w, unit = self.world, self.inverse.unit**2 * FINE
        wanted = []
        for inverse in w.renewed(*(half.inverse for half in halves)):
            square = inverse * inverse
            wanted.append((square.weighted(-(self.o.guard**2), unit), WHOLE))
        wholes = [w.map(self._inner, w.plus(x, 1.0)) for x in w.fresh(*wanted)]
        return product(Total(), wholes[:1], wholes[1:])

    def _forces(self, s, m, alpha, beta, gamma):
        """tau of both images."""
        cs, cm = (self.world.map(self.o.residual, x) for x in (s, m))

        def force(field, x):
            return product(self.spread, (field,), (x,))

        return [
            (force(alpha, cm) - force(beta, cs), FORCE),
            (force(alpha, cs) - force(gamma, cm), FORCE),
        ]


def idle():
    """For `Beside`: nothing."""
    yield []
