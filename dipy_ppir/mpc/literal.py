r"""The sums over samples computed literally, with MPyC's secure arrays.

A slow and independent twin of `contingency.Contingency`, for images of a few thousand
voxels: what a reviewer may read first, and what tests compare the fast one with. Both
owners share their rows as integers modulo 2**127 - 1, and

.. math:: P = A^T B, \qquad S = (z g)^T y, \quad z_x = \sum_t (A W)_{xt} B_{xt}

are MPyC's products, with no use of who knows what: not of whose the rows are, nor of
the weights' being zero but for a few. Integers are exact, so the results are those of
the fast one to the last bit.

Rounds: 1 for the rows, then MPyC's. Bytes: those of MPyC's arrays, 16 for each element
of A, B and g, and 96 for each element of a product.

What each party sees is what it sees of `protocols.share` and of MPyC's products: points
of random lines.
"""

import numpy as np

from dipy_ppir.mpc import mpyc_bridge
from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.contingency import table_frac_bits
from dipy_ppir.mpc.errors import FixedPointOverflowError
from dipy_ppir.mpc.fields import P127, R32, R64
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.protocols import lift, share, share_owners, truncate_between_owners

#: No more samples: MPyC's arrays hold Python's integers.
MOST_SAMPLES = 20_000


class LiteralContingency:
    """As `contingency.Contingency` in the ring of 32 bits; its arguments and results.

    Raises
    ------
    FixedPointOverflowError
        if there are more than `MOST_SAMPLES`.
    """

    field = R32

    def __init__(self, session, samples, categories, bins):
        if samples > MOST_SAMPLES:
            raise FixedPointOverflowError(
                f"{samples:,} samples would take MPyC hours: at most {MOST_SAMPLES:,}; "
                'leave backend="mpyc" out, or sample fewer voxels'
            )
        self.session = session
        self.samples, self.categories, self.bins = samples, categories, bins
        self.frac_bits = table_frac_bits(samples, R32)

    def _share(self, owner, rows, shape, bound):
        return share(
            self.session, owner, rows, shape, bound=bound, field=P127, name="rows"
        )

    def share_categories(self, index=None, keep=None):
        """See `Contingency.share_categories`."""
        hot, shape = None, (self.samples, self.categories)
        if index is not None:
            hot = np.zeros(shape)
            hot[np.arange(self.samples), index] = 1 if keep is None else keep
        self._b = self._share(STATIC, hot, shape, 1)

    def table(self, band=None, *, counted=True, kept=True):
        """See `Contingency.table`; the weights are always kept."""
        rows, one = None, float(1 << self.frac_bits)
        shape = self.samples, self.bins + 1
        if band is not None:
            values, first, keep = band(0, self.samples, one)
            rows = np.zeros(shape)
            at = first[:, None].astype(int) + np.arange(values.shape[1])
            np.put_along_axis(rows, at, values.astype(float), axis=1)
            rows[:, -1] = keep * one
        self._a = self._share(MOVING, rows, shape, one)
        bound = self.samples << self.frac_bits
        operands = self._a, self._b
        (table,) = mpyc_bridge.evaluate(self.session, _table, operands, (bound,))
        return self._in_ring(table, R32, self.frac_bits)

    def moments(self, table, positions, dim, band=None, gradient=None):
        """See `Contingency.moments`."""
        n, largest = self.samples, float(1 << 50)
        rows = None if gradient is None else gradient(0, n).astype(float)
        g = self._share(MOVING, rows, (n, dim), largest)
        # From the ring of 32 bits by that of 64, where a shift makes it the same.
        wide = table.share.astype(np.uint64).reshape(-1) << np.uint64(32)
        wide = SharedArray(R64, wide, 2, 0, (1 << 61) - 1)
        wide = share_owners(self.session, lift(self.session, wide), 32, P127, "wide")
        w = wide.reshape(*table.shape)
        # The same numbers at all parties are shares of themselves.
        y = SharedArray(P127, P127.encode_int(positions(0, n)), 1, 0, 1 << 30)
        operands, bound = (self._a, self._b, w, g, y), (1 << 61) - 1
        (moments,) = mpyc_bridge.evaluate(self.session, _moments, operands, (bound,))
        return self._in_ring(moments.reshape(-1), R64, 0)

    def _in_ring(self, array, ring, frac_bits):
        """The same integers as parts of the owners' in a ring; rounds: 1."""
        part = truncate_between_owners(self.session, array, 0, field=ring, name="ring")
        return SharedArray(ring, part, 2, frac_bits, array.bound)


def _table(mpc, a, b):
    """A transposed times B."""
    return (mpc.np_matmul(mpc.np_transpose(a), b),)


def _moments(mpc, a, b, w, g, y):
    """(z g) transposed times y, z the sum over categories of (A W) B."""
    weights = a[:, : w.shape[0]]
    z = mpc.np_sum(mpc.np_multiply(mpc.np_matmul(weights, w), b), axis=1)
    weighed = mpc.np_multiply(mpc.np_reshape(z, (-1, 1)), g)
    return (mpc.np_matmul(mpc.np_transpose(weighed), y),)
