r"""Squared differences of two images that are carried along on shares.

With images s and m of one or more channels k, and everything else as in `carried`, the
forces of an iteration are products and nothing else:

.. math::

    v_{s,a} = K(\textstyle\sum_k (m_k - s_k) \, \partial_a s_k), \quad
    v_{m,a} = K(\textstyle\sum_k (s_k - m_k) \, \partial_a m_k), \quad
    E = \sum_k \sum (m_k - s_k)^2.

A sum over channels is one output, whatever their number. In code v is times `SCALE`.
"""

import math

from dipy_ppir.mpc.algebra import Digits, Total, add_into, product
from dipy_ppir.mpc.carried import SPEED, Carried
from dipy_ppir.mpc.fields import R128

import numpy as np

SCALE = 2.0**6


class Variance:
    """Sum of the squared deviations of each channel from its mean."""

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
        x, y = left[0], right[0]
        ones = R128.encode_int(np.ones(self.voxels))
        add_into(out, R128.scale(R128.dot(x, y), self.voxels * factor))
        each = (side.reshape(-1, self.voxels, 2) for side in (x, y))
        for a, b in zip(*each, strict=True):
            sums = R128.mul(R128.dot(a, ones), R128.dot(b, ones))
            add_into(out, R128.scale(sums, -factor))


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
        self.scale = SCALE / 2.0 ** math.ceil(math.log2(math.prod(channels)))
        self.variance = Variance(operators)

    def speeds(self, static, moving, fresh=None):
        """Smoothed forces on both images, times `SCALE`; see `Carried`. Rounds: 1."""
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
        return speeds, w.secret(score, Digits(0.0, 64.0 * self.terms))

    def reference(self, halves):
        """Variances of both images: what the score is of two that have no relation."""
        x, y = ((half.image,) for half in halves)
        return product(self.variance, x, x) + product(self.variance, y, y)
