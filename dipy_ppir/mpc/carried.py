r"""Local cross-correlation of two images that are carried along on shares.

SyN moves the static image s and the moving image m towards each other, each by its half
U and V of a map. Within a level nothing is opened: images, halves and what is known of
the windows stay masked, and are carried along by the small step of an iteration, by
polynomials of it whose derivatives are public filters. What is smooth is kept on a
coarse grid C, of every h-th voxel along each axis.

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
    U_a \mathrel{+}= \delta_a + \text{the same of } U_a, \quad
    e \mathrel{+}= \text{the same}

and alike with the images exchanged. :math:`\tau_s` is DIPY's force with its smooth
factors from the coarse grid; L and P interpolate linearly and by cubics from C, K is
DIPY's Gaussian at C of what is not nearer than a radius to the border, :math:`\lambda`
the step length. The second difference does what repeated linear interpolation of its
map does in DIPY, and is what keeps the map smooth. e is improved now and then by a step
of Newton's, :math:`e (3 - (E + N g^2) e^2) / 2`. In code quantities are scaled by
powers of N, so that none depends on it: N D w, sqrt(N) e, N alpha, and so on.

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
s, m; e, f; U, V                           6             6 + 18
e, f improved, every third time (h = 2:                  24 / 3 (24 / 5)
every fifth)
**sum**                                    **12**        **140 (137)**
=========================================  ============  =====================

In large grids 12 + 140 / 27 = 17.2 elements or 276 bytes a voxel and iteration with h =
3, 12 + 137 / 8 = 29.2 or 467 with h = 2; with windows of radius 2 and less e is
improved each time, 12 + 156 / 27 and 12 + 156 / 8. The last iteration of a level
carries no images. The norms take 4 x 47 x 3.4 kB an iteration besides, from the helper
(`steps`). 13 rounds, two of them for the norm.

What each party sees is what it sees in `algebra`: uniform numbers. A rounding that goes
wrong stays wrong until the end of a level. `Shares.failures` counts the odds, below
2**-20 for a registration of [10, 10, 5] iterations of 192 x 160 x 192 voxels; `check`
finds out.
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
    Carrier,
    solid,
    sum_of,
)
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.linear import AxisMap, Linear, along, points, scratch
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

#: sqrt(N) e, N e f, rho, and so on; see `CarriedCorrelation`.
INVERSE = Digits(2.0**-12, 2.0**8)
WEIGHT = Digits(2.0**-12, 2.0**15)
COVARIANCE = Digits(2.0**-30, 8.0)
CORRELATION = Digits(2.0**-16, 4.0)
SLOPE = Digits(2.0**-14, 2.0**8)
FACTOR = Digits(2.0**-12, 2.0**14)
FORCE = Digits(2.0**-16, 2.0**8)
SPEED = Digits(2.0**-16, 2.0**5)
SQUARE = Digits(0.0, 2.0**10)
FOURTH = Digits(2.0**-32, 2.0**16)
EIGHTH = Digits(0.0, 2.0**36)
VARIANCE = Digits(2.0**-28, 2.0)
RECIPROCAL = Digits(2.0**-10, 2.0**15)
RATIO = Digits(2.0**-16, 2.0**6)
#: Sixteenths of inverse norms from which they are improved at the start of a level.
FIRST_GUESS = 13
#: The same on the way: they stay 3 % too low, and do not run away from what drifted.
CAUTIOUS_GUESS = 14
#: Unit of a step before it is rounded, in steps.
BEND_UNIT = 2.0**-14
MOST_RATE = 2.0**6


def five_point(taps, n):
    """Correlation with five taps, edges repeated, as a matrix."""
    matrix = np.zeros((n, n))
    i = np.arange(n)
    for k, w in enumerate(taps):
        np.add.at(matrix, (i, np.clip(i + k - 2, 0, n - 1)), w)
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


def straight(n, p):
    """Linear interpolation of n voxels from points p, as a matrix."""
    return np.stack([np.interp(np.arange(n), p, row) for row in np.eye(len(p))], 1)


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
    """

    def __init__(self, shape, radius, sigma, spacing, relative=None):
        self.shape = tuple(int(n) for n in shape)
        self.dim, self.radius, self.sigma = len(self.shape), radius, sigma
        self.window = (2 * radius + 1) ** self.dim
        self.guard = GUARD if radius > SMALL_RADIUS else GUARD_SMALL
        self.spacing = tuple(spacing)
        self.points = [points(n, h) for n, h in zip(self.shape, spacing, strict=True)]
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
    def box_coarse(self):
        """Window sums at the coarse points."""
        return Box(self.shape, self.radius, self.points)

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
        for n, p in zip(self.shape, self.points, strict=True):
            gauss = ndimage.gaussian_filter1d(np.eye(n), self.sigma, axis=0)[p]
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

    @cached_property
    def derivatives(self):
        """Derivatives of images by key."""
        maps = {}
        for key in self.keys:
            axes = [None] * self.dim
            if len(key) == 2 and key[0] == key[1]:
                matrix = five_point(SECOND, self.shape[key[0]])
                axes[key[0]] = AxisMap(matrix * DERIVATIVE_UNIT, DERIVATIVE_UNIT)
            else:
                for a in key:
                    matrix = five_point(FIRST, self.shape[a])
                    axes[a] = AxisMap(matrix * DERIVATIVE_UNIT, DERIVATIVE_UNIT)
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
    """Covariance within windows, at the coarse points."""

    def __init__(self, operators):
        self.o = operators

    def result(self, left, right):
        """Unit and shape of what comes of masked numbers."""
        return left[0].unit * right[0].unit / self.o.window**2, self.o.coarse

    def clear(self, left, right):
        """Of real numbers."""
        (x,), (y,), n, box = left, right, self.o.window, self.o.box_coarse.clear
        return box(x * y) / n - box(x) * box(y) / n**2

    def ring(self, left, right, out, factor):
        """Add that of packed arrays, times an integer, to `out`."""
        (x,), (y,), box = left, right, self.o.box_coarse.ring
        products = scratch("window", self.o.shape)
        products[...] = 0
        R128.addmul(products, x, y)
        R128.addmul(out, box(x), box(y), -factor)
        sums = R128.scale(box(products), self.o.window * factor)
        add_into(out, sums)


class Spread:
    """A coarse field, interpolated linearly, times an array at every voxel."""

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


class Smooth:
    """An array times the gradient of an image along an axis, smoothed."""

    def __init__(self, operators, axis):
        self.o, self.axis = operators, axis
        self.map = operators.smooth[axis]

    def result(self, left, right):
        """Unit and shape of what comes of masked numbers."""
        return left[0].unit * right[0].unit / 2 * self.map.unit, self.o.coarse

    def clear(self, left, right):
        """Of real numbers."""
        slope = np.gradient(right[0], axis=self.axis)
        edge = [slice(None)] * self.o.dim
        for at in (0, -1):
            edge[self.axis] = at
            slope[tuple(edge)] = 0
        return self.map.clear(left[0] * slope)

    def ring(self, left, right, out, factor):
        """Add that of packed arrays, times an integer, to `out`."""
        first, t, x = 3 - self.o.dim, solid(left[0]), solid(right[0])
        axes = [None] * first + self.map.axes
        n0, n1, n2, _ = t.shape
        thin = scratch("thin", (n0, *self.o.coarse[-2:]))
        for begin in range(0, n0, PLANES):
            planes = min(PLANES, n0 - begin)
            products = scratch("smooth", (planes, n1, n2))
            products[...] = 0
            kernels.slope_products(t, x, self.axis + first, begin, products, threads())
            rows = axes[1].ring(products, 1)
            thin[begin : begin + planes] = axes[2].ring(rows, 2)
        if axes[0] is not None:
            thin = axes[0].ring(thin, 0)
        add_into(out, R128.scale(thin.reshape(out.shape), factor))


# -- the protocol ------------------------------------------------------------------


class Half(NamedTuple):
    """One image and its half of the map, carried along.

    Attributes
    ----------
    image : Masked, shape of the grid
    inverse : Masked, coarse
        sqrt(N) e.
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
        warped, between 0 and 1.
    inverse : array of float, coarse
        see `inverse_norm`.
    displacement : array of float, shape (dim, coarse)
        by which it was warped, voxels.
    """

    image: np.ndarray
    inverse: np.ndarray
    displacement: np.ndarray


def inverse_norm(image, operators):
    """sqrt(N / (E + N g**2)) at the coarse points, E a window's squared deviations.

    Windows that cross the border are filled up with zeros, so that no correlation is
    larger than 1.
    """
    o, box = operators, operators.box_coarse.clear
    sums = box(image)
    squares = np.maximum(box(image * image) - sums * sums / o.window, 0)
    return np.sqrt(o.window / (squares + o.window * o.guard**2))


class CarriedCorrelation:
    """Iterations of SyN with cross-correlation at one level; see the module.

    Parameters
    ----------
    world : Clear or Shares
    operators : Operators
    step : float
        length of the longest step, voxels.
    """

    def __init__(self, world, operators, step):
        self.world, self.o, self.step = world, operators, step
        self.window, self.spread = Window(operators), Spread(operators)
        self.smooth = [Smooth(operators, a) for a in range(operators.dim)]
        self.carrier = Carrier(world, operators)
        n = operators.window
        # Products of two of these and a sum over N voxels twice: a power of two again.
        self.inverse = INVERSE._replace(
            unit=INVERSE.unit * n / 2.0 ** round(np.log2(n))
        )
        self._inner = Linear([None] * operators.dim, operators.inner)

    # -- the start of a level --------------------------------------------

    def begin(self, starts, displacements=None):
        """Share what each owner knows at the start of a level.

        Rounds: 1.

        Parameters
        ----------
        starts : dict
            maps each owner to a `Start`, or to None where it is not known.
        displacements : dict, optional
            maps each owner to its half of the map, list of Masked, at the coarse
            points; zero by default.

        Returns
        -------
        halves : dict
            maps each owner to a `Half`.
        """
        w, o, own = self.world, self.o, []
        for owner, start in starts.items():
            image, inverse = (None, None) if start is None else start[:2]
            own.append(w.own(image, owner, o.shape, IMAGE))
            own.append(w.own(inverse, owner, o.coarse, self.inverse))
        if displacements is None:
            zero = np.zeros(o.coarse)
            own += [
                w.own(None if start is None else zero, owner, o.coarse, DISPLACEMENT)
                for owner, start in starts.items()
                for _ in range(o.dim)
            ]
        own = w.masked(*own)
        images, rest = own[: 2 * len(starts)], own[2 * len(starts) :]
        halves = {}
        for k, owner in enumerate(starts):
            u = rest[k * o.dim : (k + 1) * o.dim]
            if displacements is not None:
                u = displacements[owner]
            halves[owner] = Half(*images[2 * k : 2 * k + 2], u)
        return halves

    def adjust(self, halves, starts):
        """Carry images by what their halves differ from those they were warped by.

        Rounds: 9.

        Parameters
        ----------
        halves, starts : dict
            see `begin`.

        Returns
        -------
        halves : dict
        """
        w, o, steps = self.world, self.o, []
        for owner, start in starts.items():
            for a, u in enumerate(halves[owner].displacement):
                known = None if start is None else start.displacement[a]
                known = w.own(
                    known, owner, o.coarse, Digits(u.unit, DISPLACEMENT.bound)
                )
                steps.append((expression(u) - known, STEP))
        return self.settle(self.move(halves, self._moves(w.fresh(*steps))))

    def transport(self, halves, times, parts):
        """Carry images that were not warped by their halves of the map.

        Rounds: 2 per time, and for each time 5 and the number of parts, and 6. Elements
        of both images in 3D: 6 per voxel, time and part; per point of the coarse grid
        72 + 48 + 24 per time, 6 per time and part, and 42.

        Parameters
        ----------
        halves : dict
            see `begin`.
        times, parts : int
            in how many steps, see `Carrier.advancing`; powers of two.

        Returns
        -------
        halves : dict
        """
        w = self.world
        each = [
            self.carrier.advancing(half.displacement, times, parts)
            for half in halves.values()
        ]
        for both in zip(*each, strict=True):
            steps = [(x, STEP) for step in both for x in step]
            moves = self._moves(w.fresh(*steps))
            for _ in range(parts):
                halves = self.move(halves, moves)
            images, inverses = self._known(halves)
            squares = w.fresh(*self._squares(images, inverses))
            ratios = w.fresh(*self._ratios(squares, CAUTIOUS_GUESS))
            inverses = w.fresh(*self._stepped(inverses, ratios, CAUTIOUS_GUESS))
            halves = self._with(halves, inverses)
        return self.settle(halves)

    def move(self, halves, moves):
        """Images and their inverse norms, carried along by moves. Rounds: 1."""
        wanted = []
        for half, move in zip(halves.values(), moves, strict=True):
            wanted += self._images(half, move)
        fresh = self.world.fresh(*wanted)
        return {
            owner: Half(*fresh[2 * k : 2 * k + 2], half.displacement)
            for k, (owner, half) in enumerate(halves.items())
        }

    def settle(self, halves):
        """Halves whose inverse norms were carried far, with better ones. Rounds: 6."""
        return self._with(halves, self._improved(*self._known(halves)))

    def _known(self, halves):
        """Images and inverse norms."""
        return zip(*((h.image, h.inverse) for h in halves.values()), strict=True)

    def _with(self, halves, inverses):
        """Halves with other inverse norms."""
        each = zip(halves.items(), inverses, strict=True)
        return {owner: half._replace(inverse=x) for (owner, half), x in each}

    # -- inverse norms ---------------------------------------------------

    def _improved(self, images, inverses):
        """Inverse norms of images, by two of Newton's steps from a lower first guess.

        Carried by as much as a voxel they are far off: from one coarse point to the
        next they jump. The steps tend to what they shall only where R y**2 < 3.

        Rounds: 6.
        """
        w = self.world
        squares = w.fresh(*self._squares(images, inverses))
        variances = squares[len(images) :]
        ratios = w.fresh(*self._ratios(squares, FIRST_GUESS))
        inverses = w.fresh(*self._stepped(inverses, ratios, FIRST_GUESS))
        squares = w.fresh(*self._squares((), inverses))
        ratios = w.fresh(*self._ratios([*squares, *variances]))
        return w.fresh(*self._stepped(inverses, ratios))

    def _squares(self, images, inverses):
        """First round of Newton's y (3 - R y**2) / 2: y**2 and R - g**2."""
        wanted = [(y * y, RECIPROCAL) for y in inverses]
        return wanted + [(product(self.window, (x,), (x,)), VARIANCE) for x in images]

    def _ratios(self, squares, guess=16):
        """Second round: R y**2, with y times so many sixteenths."""
        n, least = len(squares) // 2, self.o.guard**2
        return [
            ((self.world.plus(r, least) * y).times(guess**2).over(256), RATIO)
            for y, r in zip(squares[:n], squares[n:], strict=True)
        ]

    def _stepped(self, inverses, ratios, guess=16):
        """Third round: the new y."""
        return [
            ((y * self.world.plus(ratio, -3.0)).times(-guess).over(32), self.inverse)
            for y, ratio in zip(inverses, ratios, strict=True)
        ]

    # -- one iteration ---------------------------------------------------

    def iterate(self, static, moving, *, refine=False, last=False):
        """One iteration.

        Parameters
        ----------
        static, moving : Half
        refine : bool, optional
            whether to improve the inverse norms, which drift as they are carried.
        last : bool, optional
            whether nothing but the displacements will be needed.

        Returns
        -------
        halves : list of Half
        correlation : Expression, shape (1,)
            sum of the squared local correlations at the coarse points.
        """
        w, o = self.world, self.o
        speeds, correlation, inverses = self.speeds(static, moving, refine)
        rates = self.rates(speeds)
        halves, steps = (static, moving), []
        for k, half in enumerate(halves):
            for a in range(o.dim):
                step = speeds[k * o.dim + a] * rates[k]
                for bend in o.bend:
                    step = step + w.map(bend, half.displacement[a])
                steps.append((step, STEP))
        wanted = []
        moves = self._moves(w.fresh(*steps))
        for half, inverse, move in zip(halves, inverses, moves, strict=True):
            if not last:
                wanted += self._images(half._replace(inverse=inverse), move)
            for u, step in zip(half.displacement, move, strict=False):
                change = self.carrier.change(move, u)
                wanted.append((change, DISPLACEMENT, (u, step)))
        fresh = w.fresh(*wanted)
        each = len(fresh) // 2
        halves = []
        for k in range(2):
            mine = fresh[k * each : (k + 1) * each]
            image = (None, None) if last else mine[:2]
            halves.append(Half(*image, mine[-o.dim :]))
        return halves, correlation

    def speeds(self, static, moving, refine=False):
        """Smoothed forces on both images, times N, per voxel, at the coarse points.

        Returns
        -------
        speeds : list of Masked
            those of the static image along each axis, then those of the moving image.
        correlation : Expression
            see `iterate`.
        inverses : tuple of Masked
            inverse norms, improved if asked for.
        """
        w = self.world
        s, m, e, f = static.image, moving.image, static.inverse, moving.inverse
        squares = self._squares((s, m), (e, f)) if refine else []
        covariance, weight, *squares = w.fresh(
            (product(self.window, (s,), (m,)), COVARIANCE), (e * f, WEIGHT), *squares
        )
        rho, *ratios = w.fresh(
            (covariance * weight, CORRELATION), *self._ratios(squares, CAUTIOUS_GUESS)
        )
        alpha, p, q, *inverses = w.fresh(
            (rho * weight, FACTOR),
            (rho * e, SLOPE),
            (rho * f, SLOPE),
            *self._stepped((e, f) if refine else (), ratios, CAUTIOUS_GUESS),
        )
        beta, gamma = w.fresh((p * p, FACTOR), (q * q, FACTOR))
        forces = self._forces(s, m, alpha, beta, gamma)
        speeds = w.fresh(
            *(
                (product(form, (force,), (x,)), SPEED)
                for force, x in zip(forces, (s, m), strict=True)
                for form in self.smooth
            )
        )
        inner = w.map(self._inner, rho)
        correlation = product(Total(), (inner,), (inner,))
        return speeds, correlation, tuple(inverses) or (e, f)

    def _forces(self, s, m, alpha, beta, gamma):
        """tau of both images."""
        cs, cm = (self.world.map(self.o.residual, x) for x in (s, m))

        def force(field, x):
            return product(self.spread, (field,), (x,))

        return self.world.fresh(
            (force(alpha, cm) - force(beta, cs), FORCE),
            (force(alpha, cs) - force(gamma, cm), FORCE),
        )

    def rates(self, speeds):
        """By what to multiply each image's speeds for the longest step to be right."""
        w, dim = self.world, self.o.dim
        squares = w.fresh(
            *(
                (sum_of(v * v for v in speeds[k : k + dim]), SQUARE)
                for k in range(0, len(speeds), dim)
            )
        )
        fourths = w.fresh(*((x * x, FOURTH) for x in squares))
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
            numbers += [(half.image, IMAGE), (half.inverse, self.inverse)]
        for half in halves:
            numbers += [(u, DISPLACEMENT) for u in half.displacement]
        self.world.check(*numbers)

    def _moves(self, steps):
        """Moves of the steps of both images. Rounds: 1."""
        dim = self.o.dim
        steps = [steps[:dim], steps[dim:]]
        products = self.world.fresh(
            *((x, STEP) for step in steps for x in self.carrier.products(step))
        )
        each = len(products) // 2
        return [[*steps[k], *products[k * each : (k + 1) * each]] for k in range(2)]

    def _images(self, half, moves):
        """What an image and its inverse norms become."""
        change = self.carrier.change(moves, half.inverse)
        return [
            self.carrier.image(moves, half.image),
            (change, self.inverse, (half.inverse,)),
        ]
