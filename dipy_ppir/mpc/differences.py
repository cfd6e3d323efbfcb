r"""Squared differences of two images that are carried along on shares.

With images s and m of one or more channels k, and everything else as in `carried`, the
forces of an iteration are products and nothing else:

.. math::

    v_{s,a} = K(\textstyle\sum_k (m_k - s_k) \, \partial_a s_k), \quad
    v_{m,a} = K(\textstyle\sum_k (s_k - m_k) \, \partial_a m_k), \quad
    E = \sum_k \sum (m_k - s_k)^2

with the differences of all voxels and E their score. A sum over channels is one output,
whatever their number. In code v is times a power of two, see `SCALE`.

Elements of 16 bytes of both images together, in 3D (`algebra`: a product masked takes
3):

=========================================  ==============  =====================
step                                       a voxel         per point of C
                                           and channel
=========================================  ==============  =====================
v                                                          18
abs(v)**2, its square                                      12
c, E: 2 norms and rates, a sum
delta                                                      18
products of delta                                          36
s, m; U, V                                 6               18
**sum**                                    **6**           **102**
=========================================  ==============  =====================

In large grids 6 + 102 / 27 = 9.8 elements or 156 bytes a voxel and iteration with h = 3
and one channel, 6 + 102 / 8 = 18.8 or 300 with h = 2. Of 12 channels at every second
voxel along each axis: 6 x 12 / 8 + 102 / 27 = 12.8 or 204, and 21.8 or 348. The last
iteration of a level carries no image: five take 137 and 281, 176 and 319 each. The
norms take as much as in `carried`. 8 rounds, two of them for the norm.

Two owners alone (`pairalgebra`) take elementary products instead: in 3D 49 a voxel and
channel (12 for v, 36 for s and m, 1 for E) and 148 a point of C, in the plane 29 and
64. 9 rounds, and those of the norms' circuits.

What each party sees is what it sees in `algebra`: uniform numbers. `Shares.failures` is
below 2**-26 for a registration of [10, 10, 5] iterations of 192 x 160 x 192 voxels,
2**-21 where images are carried by whole halves, of one channel or of 12.
"""

import math

import numpy as np

from dipy_ppir.mpc.algebra import Digits, Total, add_into, product, summed
from dipy_ppir.mpc.carried import SPEED, Carried
from dipy_ppir.mpc.fields import R128

#: Forces of one channel are kept times this: `rates` tells apart what is from 1e-4 to
#: 0.4 of the 8th root of the sum of their 8th powers. That is 0.003 to 0.1 of images,
#: and 0.14 of a chessboard that is off by half a field. Channels share it among them.
SCALE = 2.0**6
#: No difference of two carried numbers is larger.
MOST_APART = 8.0


class Variance:
    """Sum of the squared deviations of each channel from its mean.

    Parameters
    ----------
    operators : Operators
    """

    symmetric = True

    def __init__(self, operators):
        self.voxels = math.prod(operators.shape)

    def result(self, left, right):
        """Unit and shape of what comes of masked numbers."""
        return left[0].unit * right[0].unit / self.voxels, (1,)

    def clear(self, left, right):
        """Of real numbers."""
        x, y = (side[0].reshape(-1, self.voxels) for side in (left, right))
        sums = x.sum(axis=1) @ y.sum(axis=1)
        return np.array([np.vdot(x, y) - sums / self.voxels])

    def ring(self, left, right, out, factor):
        """Add that of packed arrays, times an integer, to `out`."""
        x, y = (side[0].reshape(-1, self.voxels, 2) for side in (left, right))
        ones = R128.encode_int(np.ones(self.voxels))
        add_into(out, R128.scale(R128.dot(x, y), self.voxels * factor))
        for a, b in zip(x, y, strict=True):
            sums = R128.mul(R128.dot(a, ones), R128.dot(b, ones))
            add_into(out, R128.scale(sums, -factor))

    def factors(self, side, arrays, shape):
        """See `algebra.Product`: each channel, and the sum of each."""
        x = arrays[0].reshape(-1, self.voxels, 2)
        yield 0, x
        yield 1, np.concatenate([summed(channel) for channel in x])

    def collect(self, kind, products, out):
        """See `algebra.Product`."""
        add_into(out, R128.scale(summed(products), -1 if kind else self.voxels))


class CarriedDifferences(Carried):
    """Iterations with squared differences.

    The score is their sum over all voxels and channels.

    Parameters
    ----------
    world, operators, step, channels
        see `Carried`.
    """

    better = -1

    def __init__(self, world, operators, step, channels=()):
        super().__init__(world, operators, step, channels)
        self.terms = math.prod(self.shape)
        self.variance = Variance(operators)
        self.scale = SCALE / 2.0 ** math.ceil(math.log2(math.prod(channels)))

    def speeds(self, static, moving, fresh=None):
        """Smoothed forces on both images, times `scale`; see `Carried`. Rounds: 1."""
        w, fresh = self.world, fresh or self.world.fresh
        s, m = static.image, moving.image
        apart = w.minus(m, s)
        speeds = fresh(
            *(
                (product(form, (apart,), (x,)).times(sign).over(1 / self.scale), SPEED)
                for x, sign in ((s, 1), (m, -1))
                for form in self.smooth
            )
        )
        # Computed now: the images are not kept until the end of the level.
        score = product(Total(), (apart,), (apart,))
        return speeds, w.secret(score, Digits(0.0, MOST_APART**2 * self.terms))

    def reference(self, halves):
        """Variances of both images: about the score of two that have no relation."""
        x, y = ((x,) for x in self.world.renewed(*(half.image for half in halves)))
        return product(self.variance, x, x) + product(self.variance, y, y)
