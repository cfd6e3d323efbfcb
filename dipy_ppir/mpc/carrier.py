r"""Images and coarse arrays that a displacement carries along on shares.

A displacement :math:`\delta`, known on a coarse grid, takes f to :math:`f(x + \delta)`,
by a Taylor polynomial with public derivatives:

.. math::

    f \mathrel{+}= \sum_a \delta_a \partial_a f
        + \sum_{a \le b} \delta_{ab} \partial_{ab} f, \quad
    \delta_{ab} = \delta_a \delta_b, \quad \delta_{aa} = \delta_a^2 / 2

The *moves* of a displacement are :math:`\delta_a` along each axis and these products.
Polynomials of second order with derivatives of five points hold for displacements of up
to a quarter of a voxel or so in every direction: of longer ones the finest detail
grows.

**Maps as flows.** What is carried along by :math:`(id + t U)^{-1}` is carried from t to
t + dt by

.. math:: - dt \, U_t + dt^2 \, (U_t \cdot \nabla) U_t + O(dt^3),

with :math:`U_t` the displacement U itself, carried along. So of the backward
displacements U and V of two halves, as they are in the end, the map from one image to
the other can be composed: :math:`(id + V) \circ (id + U)^{-1}` moves a voxel by V - U,
carried along by :math:`(id + U)^{-1}` (`Carrier.composed`). And :math:`U_t`, taken from
t = 1 to 0, is the velocity at which the identity becomes id + U: in small steps of it
an image can be carried by a displacement of many voxels (`Carrier.advancing`).
"""

import math

import numpy as np

from dipy_ppir._kernels import carry as kernels
from dipy_ppir.mpc.algebra import Digits, add_into, expression, product
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.threads import threads

#: Taps of the first and second derivative of five points, times 12; and of the first
#: one of seven, times 192, nearly as good as that of sixth order.
FIRST = np.array([1, -8, 0, 8, -1])
SECOND = np.array([-1, 16, -30, 16, -1])
WIDE = np.array([-3, 29, -145, 0, 145, -29, 3])
DERIVATIVE_UNIT, WIDE_UNIT = 1 / 12, 1 / 192

IMAGE = Digits(2.0**-16, 4.0)
#: Steps and displacements in voxels. 144 is the divisor of mixed derivatives: with it
#: in the unit what a step adds to an image counts multiples of a power of two.
STEP = Digits(144 * 2.0**-25, 1.0)
DISPLACEMENT = Digits(STEP.unit, 2.0**9)


def solid(x):
    """A packed array of two or three dimensions as one of three."""
    x = np.ascontiguousarray(x)
    return x if x.ndim == 4 else x[None]


def channels(x, shape):
    """Each channel of a packed array on a grid, as arrays of three dimensions."""
    return [solid(c) for c in x.reshape(-1, *shape, 2)]


def sum_of(expressions):
    """Sum of expressions."""
    first, *rest = expressions
    for x in rest:
        first = first + x
    return first


class Carry:
    """What an image changes by when a displacement carries it: a Taylor polynomial.

    On the left its moves, on the coarse grid, in the order of `Operators.keys`; on the
    right the image, or channels that are carried alike.

    Parameters
    ----------
    operators : Operators
    wide : bool, optional
        with first derivatives of seven points: waves that are carried by many voxels
        stay together better.
    """

    symmetric = False

    def __init__(self, operators, wide=False):
        self.o, self.wide = operators, wide
        self.derivatives = operators.derivatives(wide)
        self.unit = (WIDE_UNIT if wide else DERIVATIVE_UNIT) ** 2

    def result(self, left, right):
        """Unit and shape of what comes of masked numbers."""
        unit = left[0].unit * right[0].unit * self.o.cubic.unit
        return unit * self.unit, right[0].shape

    def clear(self, left, right):
        """Of real numbers."""
        images = right[0].reshape(-1, *self.o.shape)
        out = np.zeros(images.shape)
        for key, field in zip(self.o.keys, left, strict=True):
            spread = self.o.cubic if len(key) == 1 else self.o.straight
            wide = spread.clear(field)
            for image, total in zip(images, out, strict=True):
                total += wide * self.derivatives[key].clear(image)
        return out.reshape(right[0].shape)

    def ring(self, left, right, out, factor):
        """Add that of packed arrays, times an integer, to `out`."""
        o = self.o
        fields = [solid(f) for f in left]
        for x, y in zip(*(channels(a, o.shape) for a in (right[0], out)), strict=True):
            kernels.carry(
                fields,
                o.codes,
                o.cubic_bands,
                o.straight_bands,
                x,
                factor,
                self.wide,
                y,
                threads(),
            )

    def factors(self, side, arrays, shape):
        """See `algebra.Product`: moves at all voxels, and derivatives, by key."""
        o, kept = (
            self.o,
            (math.prod(shape) // math.prod(self.o.shape), *self.o.shape, 2),
        )
        for k, key in enumerate(o.keys):
            if side:
                images = arrays[0].reshape(kept)
                yield 0, np.stack([self.derivatives[key].ring(x) for x in images])
                continue
            spread = o.cubic if len(key) == 1 else o.straight
            unit = round(self.derivatives[key].unit / self.unit)
            wide = R128.scale(spread.ring(arrays[k]), unit)
            yield 0, np.broadcast_to(wide, kept)

    def collect(self, kind, products, out):
        """See `algebra.Product`."""
        add_into(out, products.reshape(out.shape))


class Carrier:
    """Carries images and coarse arrays along; see the module.

    Parameters
    ----------
    world : Clear or Shares
    operators : Operators
    """

    def __init__(self, world, operators):
        self.world, self.o = world, operators
        self._carry = {wide: Carry(operators, wide) for wide in (False, True)}

    def products(self, step):
        """Products of the components of a step, which its moves need."""
        return [
            # 9 makes the unit of a product that of a step, but for a power of two.
            (step[a] * step[b]).times(9).over(18 if a == b else 9)
            for a, b in self.o.keys[self.o.dim :]
        ]

    def image(self, moves, image, wide=False):
        """What to make fresh for an image to be carried along; see `Carry`."""
        return product(self._carry[wide], moves, (image,)), IMAGE, (image,)

    def change(self, moves, x):
        """By what a coarse array changes."""
        return sum_of(
            self.world.map(self.o.slopes[key], x) * move
            for move, key in zip(moves, self.o.keys, strict=False)
        )

    def receding(self, back, times, others=()):
        """A displacement, and others, carried along by its own inverse, bit by bit.

        Elements: 36 per point of the coarse grid and time in 3D, and 3 per number of
        the others. Rounds: 2 per time.

        Parameters
        ----------
        back : list of Masked
            U, of the unit of `DISPLACEMENT`, voxels.
        times : int
            a power of two.
        others : list of Masked, optional
            of the unit of `DISPLACEMENT`.

        Yields
        ------
        back, others : list of Masked
            carried along by (id + t U)^-1 for t of 1 / times, 2 / times, ... 1.
        """
        w, dim, fields = self.world, self.o.dim, [*back, *others]
        digits = Digits(STEP.unit / times, DISPLACEMENT.bound)
        for _ in range(times):
            back = fields[:dim]
            drift = [self.change(back, u) for u in back]
            both = [*drift, *self.products(back)]
            moves = w.fresh(*((x.over(times**2), digits) for x in both))
            wanted = []
            for u in fields:
                change = self.change(moves, u) - self.change(back, u).over(times)
                wanted.append((change, DISPLACEMENT, (u,)))
            fields = w.fresh(*wanted)
            yield fields[:dim], fields[dim:]

    def composed(self, back, away, times):
        """Displacement of (id + `away`) after the inverse of (id + `back`).

        Parameters
        ----------
        back, away : list of Masked
        times : int
            see `receding`. No displacement should be larger than so many voxels.

        Returns
        -------
        displacement : list of Expression
        """
        *_, (back, away) = self.receding(back, times, away)
        return [expression(v) - u for u, v in zip(back, away, strict=True)]

    def advancing(self, whole, times, parts):
        """Steps that together make up a displacement, the first one first.

        What recedes by the inverse of a displacement does so at the velocity that it
        has just then. The same velocities in reverse order bring it about.

        Parameters
        ----------
        whole : list of Masked
        times : int
            see `receding`.
        parts : int
            how many steps there are between two times.

        Returns
        -------
        steps : list of list of Expression
            one for each time, to be taken `parts` times.
        """
        passed = [whole, *(back for back, _ in self.receding(whole, times))]
        return [
            [
                (expression(u) + v).over(2 * times * parts)
                for u, v in zip(passed[k], passed[k + 1], strict=True)
            ]
            for k in reversed(range(times))
        ]
