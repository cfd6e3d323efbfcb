"""What registrations of two owners alone take, where the products they need are known.

Two owners alone make products ahead, which takes most of the time and of the traffic
(`dipy_ppir.mpc.multiplications`): so the estimate counts these, by what the docstrings
of `dipy_ppir.mpc.carried` and `differences` state of iterations.
"""

import math
from typing import NamedTuple

from dipy_ppir.mpc import bfv, multiplications

#: Bytes of a product, made ahead as the sums of most are, and used; seconds, of both
#: owners at the same time; what is left over of the last batches, in products.
_BYTES, _SECONDS, _SPARE = 325, 1.6e-6, 15 * multiplications.BATCH
#: Keys and transfers, of either owner, and the seconds that they take.
_KEYS, _KEYS_WORK = 2 * bfv.CIPHERTEXT + 60_000, 0.02
#: Rounds in which a step's factors are found by its highest bits; rounds that making
#: products ahead adds to one that takes them.
_RATES, _AHEAD = 16, 1
#: Products that a rotation takes besides those of points, rounds, and seconds.
_ROTATION = {2: (300, 36, 0.02), 3: (750, 89, 0.03)}
#: Bytes of what is opened and told, and of comparisons.
_POINTS_END = 40_000


class Cost(NamedTuple):
    """What a part of a registration takes; see `estimate.Stage`."""

    sent: float
    waits: float
    work: float


def of_products(products, rounds, spare=0):
    """What products take that are used in so many rounds."""
    sent = _BYTES * (products + spare)
    return Cost(sent, rounds * (1 + _AHEAD), _SECONDS * (products + spare))


def points(n, dim):
    """What a registration of n points takes."""
    besides, rounds, work = _ROTATION[dim]
    batch = multiplications.BATCH
    batches = math.ceil(({2: 3, 3: 9}[dim] * n + besides) / batch)
    sent = 452 * batch * batches + _KEYS + _POINTS_END
    return Cost(sent, rounds, work + _KEYS_WORK + 2 * _SECONDS * batch * batches)


class Level(NamedTuple):
    """Products that a level of SyN is made of.

    Attributes
    ----------
    fine, coarse : int
        voxels that are carried, and points of the grid of steps.
    dim : int
    channels : int
        numbers of each voxel.
    correlates : bool
        whether the metric is cross-correlation.
    """

    fine: int
    coarse: int
    dim: int
    channels: int
    correlates: bool

    @property
    def keys(self):
        """How many derivatives an image is carried by."""
        return self.dim + self.dim * (self.dim + 1) // 2

    @property
    def image(self):
        """Of both images that are carried by one step."""
        return 4 * self.keys * self.fine * self.channels

    @property
    def moves(self):
        """Of the products of both steps' components."""
        return 2 * self.dim**2 * self.coarse

    def receding(self, fields):
        """Of one time of `Carrier.receding`."""
        dim = self.dim
        return (3 * dim**2 + fields * 2 * (self.keys + dim)) * self.coarse

    @property
    def iteration(self):
        """Of an iteration that does not carry the images."""
        dim = self.dim
        points = 6 * dim + 4 + 2 * dim**2 + 4 * dim * self.keys
        voxels = 4 * dim + 1
        if self.correlates:
            return (points + 14) * self.coarse + (4 * dim + 10) * self.fine
        return points * self.coarse + voxels * self.fine * self.channels

    @property
    def normalizing(self):
        """Of the inverse norms of windows."""
        return (4 * self.fine + 58 * self.coarse) * self.correlates

    def cost(self, count, refined, times=None, parts=0, first=False):
        """What a level takes.

        Parameters
        ----------
        count : int
            iterations.
        refined : int
            how often inverse norms are computed anew.
        times, parts : int, optional
            see `Carrier.advancing`; None where halves are opened before.
        first : bool, optional
            whether no images were carried before.
        """
        products = count * self.iteration + (count - 1) * self.image
        products += (1 + refined) * self.normalizing
        rounds = count * (13 if self.correlates else 9) + 11 * self.correlates
        if not first and times is None:
            products += self.moves + self.image
            rounds += 3
        elif not first:
            each = 2 * self.receding(self.dim) + self.moves + parts * self.image
            products += times * each
            rounds += times * (4 + parts)
        cost = of_products(products, rounds, first * _SPARE)
        waits, work = count * _RATES + 12, first * _KEYS_WORK
        return Cost(cost.sent + first * _KEYS, cost.waits + waits, cost.work + work)

    def composing(self, times):
        """What it takes to put both halves together."""
        return of_products(times * self.receding(2 * self.dim), 2 * times + 10)
