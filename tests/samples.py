"""Samples of two owners, for tests of the mutual information on shares."""

import numpy as np

from dipy_ppir.mpc import worlds
from dipy_ppir.mpc.contingency import table_frac_bits
from dipy_ppir.mpc.fields import R32
from dipy_ppir.mpc.information import DIFFERENCE_BITS, SUM_BITS, Moving
from dipy_ppir.mpc.ledger import MOVING, STATIC

#: Fraction bits of what is evaluated.
DIGITS = 24


class Samples:
    """Samples of two owners, and what is to be computed of them."""

    def __init__(self, n, dim=3, bins=12, categories=8, seed=0, masked=False, p=4):
        rng = np.random.default_rng(seed)
        self.n, self.dim, self.bins, self.categories = n, dim, bins, categories
        self.masked, self.p = masked, p
        self.frac_bits = table_frac_bits(n, R32)
        self.index = rng.integers(0, categories, n).astype(np.int32)
        # Intensities that depend on the category, so that there is information.
        at = self.index / categories * (bins - 5) + rng.normal(0, 0.8, n)
        self.first = np.clip(at, 0, bins - 5).astype(np.int32)
        u = rng.random(n)[:, None] + np.array([-1, 0, 1, 2])
        size = np.abs(u - 0.5)
        weights = np.maximum(2 - size, 0) ** 3
        self.weights = weights / weights.sum(axis=1, keepdims=True)
        self.keep_static = rng.random(n) < (0.8 if masked else 2)
        self.keep_moving = rng.random(n) < (0.7 if masked else 2)
        self.gradient = rng.normal(0, 0.02, (n, dim))
        self.matrix = rng.normal(0, 1, (p, dim * (dim + 1))) / 8
        y = rng.integers(-30, 30, (n, dim + 1))
        y[:, -1] = 1
        self.y = y.astype(np.int64)

    def positions(self, start, stop):
        return self.y[start:stop]

    def integers(self, scale):
        """Rounded weights that sum to one, as the kernels make them."""
        values = np.rint(self.weights * scale).astype(np.int64)
        values[:, 1] += int(scale) - values.sum(axis=1)
        return values * self.keep_moving[:, None]

    def band(self, start, stop, scale):
        keep = self.keep_moving[start:stop].astype(np.uint8)
        return self.integers(scale)[start:stop], self.first[start:stop], keep

    @property
    def scale(self):
        largest = 30 * np.log(2) * (np.abs(self.gradient).T @ np.abs(self.y)).max()
        if not largest:
            return 2.0**40
        bits = SUM_BITS - 1 - self.frac_bits - DIFFERENCE_BITS
        return 2.0 ** np.floor(bits - np.log2(largest))

    def moving(self):
        def rounded(start, stop):
            return np.rint(self.gradient[start:stop] * self.scale).astype(np.int64)

        return Moving(self.band, rounded, self.matrix / (self.n * self.scale))

    def clear(self):
        """Value, gradient and slopes with the same rounded weights."""
        one = 2.0**self.frac_bits
        dense = np.zeros((self.n, self.bins))
        at = self.first[:, None] + np.arange(4)
        np.put_along_axis(dense, at, self.integers(one) / one, axis=1)
        keep = (self.keep_static & self.keep_moving).astype(float)
        hot = np.eye(self.categories)[self.index] * self.keep_static[:, None]
        table = dense.T @ hot
        v = keep.sum()
        # A unit is added to every number, so that none is zero.
        p = (table + 1 / one) / v
        rows, counts = table.sum(axis=1) + 1 / one, keep @ hot + 1 / one
        product = rows[:, None] * counts / v**2
        value = -(table / v * np.log(p / product)).sum()
        w = np.log((table + 1 / one) / rows[:, None])
        d = np.empty_like(w)
        d[1:-1] = (w[2:] - w[:-2]) / 2
        d[0], d[-1] = w[1] - w[0], w[-1] - w[-2]
        z = -(dense * d.T[self.index]).sum(axis=1) * keep
        sums = np.einsum("n,nd,ne->de", z, self.gradient, self.y).reshape(-1)
        slope = d.copy()
        slope[[0, -1]] = 0
        slopes = ((table + 1 / one) * slope**2).sum(axis=1) / rows
        return value, self.matrix @ sums / v, slopes

    def begin(self, session, sent=None):
        """What evaluates at a party, with the categories shared; and what the moving
        owner brings."""
        information = worlds.information(
            session,
            self.n,
            self.categories,
            self.bins,
            self.positions,
            self.dim,
            masked=self.masked,
            digits=DIGITS,
            sent=sent,
        )
        mine = (self.index, self.keep_static if self.masked else None)
        information.share_categories(*(mine if session.pid == STATIC else ()))
        return information, self.moving() if session.pid == MOVING else None

    def evaluate(self, session, scale=128.0, slopes=False):
        information, moving = self.begin(session)
        return information.evaluate(scale, self.p, moving, slopes=slopes)
