r"""Sums over samples of two owners' rows, without showing either row.

The static owner knows a category t(x) for each of n samples x, the moving owner
a short band of weights A(x, r). Two sums are computed:

table
    :math:`P(r, t) = \sum_x A(x, r) B(x, t)` with the one-hot rows
    :math:`B(x, t) = [t(x) = t]`;
contraction
    :math:`G_k = \sum_x z(x) g_k(x)`, :math:`z(x) = \sum_t K(x, t) B(x, t)`, for
    rows K and columns g that the moving owner knows.

B is shared once (`share_categories`), A, K and g at every evaluation.

Both owners keep what they dealt, and this saves a third of the work. With
:math:`X = 3 X_1 - 2 X_2` (the moving owner's line at the points of the static
owner and the helper) and :math:`B = (3 B_0 - B_2) / 2` (the static owner's line
at the points of the moving owner and the helper),

.. math:: X B = \tfrac{3}{2} X B_0 - \tfrac{3}{2} X_1 B_2 + X_2 B_2,

the moving owner can compute the first term from its own clear X, which is five
weights a row instead of a dense random row; the static owner the second, since
it dealt B_2; the helper the third. These are the additive parts of a degree-2
sharing, which is what every other protocol expects.

=================  ======================================  ==================
step               elements per sample, all links          rounds
=================  ======================================  ==================
share_categories   categories (once)                       1
table              bins + 1                                1 + opening
contract           categories + 2 + columns                2 + opening
contract_shared    bins + 3 categories + 2 + columns       4 + opening
=================  ======================================  ==================

What each party sees: the static owner and the helper one point each of fresh
random lines through the rows of A, K, g and of the parts of z; the moving owner
one point of the lines through B and z. Each is uniform and independent of the
secrets, so a simulator draws it at random. Nothing is opened here.
"""

import numpy as np

from dipy_ppir.mpc.arrays import LAGRANGE, SharedArray
from dipy_ppir.mpc.errors import FixedPointOverflowError
from dipy_ppir.mpc.fields import P61
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC
from dipy_ppir.mpc.protocols import reduce, reshare_parts, share_elements

#: Samples handled at a time: the working set stays in the second-level cache.
BLOCK = 1 << 12
#: The sum of a contraction stays below 2**SUM_BITS.
SUM_BITS = 59
#: No scaled element of a row is larger than 2**ROW_BITS.
ROW_BITS = 50
#: Bits that rows get more than half of: most columns are near zero while their
#: largest elements set the sums, so they need fewer.
ROW_SHARE = 1


def table_frac_bits(samples):
    """Fraction bits of the weights of a table over a number of samples."""
    return min(40, SUM_BITS - max(int(samples), 1).bit_length())


class Contingency:
    """Tables and contractions over the samples of one static image.

    Parameters
    ----------
    session : Session
    samples : int
        number of samples n; public.
    categories : int
        number of categories of the static owner; public.
    bins : int
        number of bins of the moving owner; public.
    """

    field = P61

    def __init__(self, session, samples, categories, bins):
        self.session = session
        self.samples, self.categories, self.bins = samples, categories, bins
        self.frac_bits = table_frac_bits(samples)
        self._b = None
        self._block_sums = {}
        self._scratch = {}

    def _buffer(self, name, shape):
        """Scratch elements, allocated once: fresh pages cost more than the sums."""
        rows, width = shape
        if name not in self._scratch or self._scratch[name].shape[1] != width:
            self._scratch[name] = self.field.empty((BLOCK, width))
        return self._scratch[name][:rows]

    def _draw(self, name, shape):
        """The moving owner's random points of a block, at it and the static owner."""
        s = self.session
        peer = STATIC if s.pid == MOVING else MOVING
        out = self._buffer(name, shape)
        return s.random_elements(peer, MOVING, self.field, shape, out=out)

    def _receive(self, name, shape):
        """The moving owner's other points of a block, at the helper."""
        out = self._buffer(name, shape)
        return self.session.receive_elements(MOVING, self.field, shape, name, out=out)

    def _blocks(self):
        for start in range(0, self.samples, BLOCK):
            yield start, min(start + BLOCK, self.samples)

    def share_categories(self, index=None, keep=None):
        """Share the static owner's one-hot rows.

        Rounds: 1. Elements: `categories` per sample, static owner to helper.

        Parameters
        ----------
        index : array of int32, shape (n,), at the static owner only
            category of each sample, in [0, categories).
        keep : array of bool, shape (n,), optional
            samples to leave out have a zero row; whether any is left out shows
            nowhere.
        """
        s, f = self.session, self.field
        self._index, self._keep = index, keep
        self._b = np.empty((self.samples, self.categories), dtype=np.uint64)
        for start, stop in self._blocks():
            shape = (stop - start, self.categories)
            part = self._b[start:stop]
            if s.pid == STATIC:
                rows = np.zeros(shape, dtype=np.uint64)
                chosen = index[start:stop]
                one = 1 if keep is None else keep[start:stop].astype(np.uint64)
                rows[np.arange(len(rows)), chosen] = one
                r = s.random_elements(MOVING, STATIC, f, shape)
                f.kernels.share_third(f.flat(r), f.flat(rows), f.flat(part))
                s.network.send(HELPER, "categories", part)
            elif s.pid == HELPER:
                s.receive_elements(STATIC, f, shape, "categories", out=part)
            else:
                part[...] = s.random_elements(STATIC, STATIC, f, shape)
                ones = f.encode_int(np.ones((1, len(part)), dtype=np.int64))
                self._block_sums[start] = f.matmul(ones, part)[0]

    def table(self, band=None):
        """Shared table of the weights by bin and category.

        Rounds: 1. Elements: ``bins + 1`` per sample, moving owner to helper.

        Parameters
        ----------
        band : callable, at the moving owner only
            ``band(start, stop, scale)`` returns the weights of those samples as
            integers: `values` (k, w), the first bin `first` (k,), and `keep`
            (k,), which is 1 for samples that count.

        Returns
        -------
        table : SharedArray, shape (bins + 1, categories), degree 2
            The last row counts the samples that `keep` keeps.
        """
        s, f = self.session, self.field
        columns = self.bins + 1
        acc = f.zeros((columns, self.categories))
        one = 1 << self.frac_bits
        half = f.inverse(2)
        kept = []
        for start, stop in self._blocks():
            shape = (stop - start, columns)
            b = self._b[start:stop]
            if s.pid == MOVING:
                values, first, keep = band(start, stop, float(one))
                r = self._draw("points", shape)
                out = self._buffer("band", shape)
                f.kernels.share_upper_banded(r, values, first, out)
                # The band leaves the last column alone; put the counts there.
                counts = keep.astype(np.int64) * one
                last = f.scale(f.encode_int(counts), -half)
                out[:, -1] = f.add(np.ascontiguousarray(out[:, -1]), last)
                s.network.send(HELPER, "band", out)
                f.kernels.gram_banded(values, first, b, acc)
                if keep.all():
                    kept.append(start)
                else:
                    at = np.full(len(counts), self.bins, dtype=first.dtype)
                    f.kernels.gram_banded(counts[:, None], at, b, acc)
            elif s.pid == STATIC:
                f.kernels.gram(self._draw("points", shape), b, acc)
            else:
                f.kernels.gram(self._receive("band", shape), b, acc)
        for start in kept:
            # Blocks of which every sample counts: their sums do not change.
            acc[-1] = f.add(acc[-1], f.scale(self._block_sums[start], one))
        if s.pid != HELPER:
            acc = f.scale(acc, half)
        return SharedArray(f, acc, 2, self.frac_bits, self.samples * one)

    def contract(self, columns, rows=None, column_blocks=None, scales=None):
        """Shared sums of categories' values times columns; K known to an owner.

        The moving owner scales its numbers to integers on its own; the sums
        come out scaled by ``row_scale * column_scales``, known to it alone.

        Rounds: 2. Elements: ``categories + columns + 2`` per sample.

        Parameters
        ----------
        columns : int
            number p of columns g; public.
        rows : callable, at the moving owner only
            ``rows(start, stop)`` returns K of those samples, shape (k, q).
        column_blocks : callable, at the moving owner only
            ``column_blocks(start, stop)`` returns g, shape (k, p).
        scales : Scales, at the moving owner only
            see `choose_scales`.

        Returns
        -------
        sums : SharedArray, shape (p,), degree 2
        """
        s, f = self.session, self.field

        def selected(start, stop):
            b = self._b[start:stop]
            z = f.empty((stop - start,))
            if s.pid == MOVING:
                k = f.encode(rows(start, stop) * scales.row, 0, 2.0**ROW_BITS)
                r = self._draw("points", b.shape)
                out = self._buffer("rows", b.shape)
                f.kernels.share_upper(f.flat(r), f.flat(k), f.flat(out))
                s.network.send(HELPER, "rows", out)
            elif s.pid == STATIC:
                k = self._draw("points", b.shape)
            else:
                k = self._receive("rows", b.shape)
            f.kernels.dot_rows(k, b, z)
            return z

        # Every share of z but the helper's carries a factor of 1/2.
        weight = 1 if s.pid == HELPER else f.inverse(2)
        return self._weigh(selected, weight, columns, column_blocks, scales)

    def contract_shared(
        self, table, columns, band=None, column_blocks=None, scales=None
    ):
        """Shared sums of categories' values times columns; K known to nobody.

        K(x, t) is the moving owner's band of x times a shared table.

        Rounds: 4. Elements: ``bins + 3 categories + columns + 2`` per sample.

        Parameters
        ----------
        table : SharedArray, shape (bins, categories), degree 1
        columns : int
            number p of columns g; public.
        band : callable, at the moving owner only
            ``band(start, stop, scale)`` returns the integers `values` (k, w) and
            the first bin `first` (k,).
        column_blocks, scales
            as for `contract`; ``scales.row`` is the scale of the band.

        Returns
        -------
        sums : SharedArray, shape (p,), degree 2
        """
        s, f = self.session, self.field

        def selected(start, stop):
            shape = (stop - start, self.bins)
            if s.pid == MOVING:
                values, first = band(start, stop, scales.row)
                r = self._draw("points", shape)
                out = self._buffer("derivative", shape)
                f.kernels.share_upper_banded(r, values, first, out)
                s.network.send(HELPER, "derivative", out)
                part = f.axpby(2, r, -1, out)
            elif s.pid == STATIC:
                part = self._draw("points", shape)
            else:
                part = self._receive("derivative", shape)
            k = SharedArray(f, f.matmul(part, table.share), 2, 0, 0)
            k = reduce(s, k, "selection")
            z = f.empty((stop - start,))
            f.kernels.dot_rows(k.share, self._b[start:stop], z)
            if s.pid == STATIC:
                # It keeps the helper's point B_2; its own is (B + 2 B_2) / 3.
                third = f.inverse(3)
                z = f.axpby(third, self._pick(k.share, start, stop), 2 * third, z)
            return z

        return self._weigh(selected, 1, columns, column_blocks, scales)

    def _pick(self, rows, start, stop):
        """Each row's element at the static owner's own category; 0 if left out."""
        picked = rows[np.arange(len(rows)), self._index[start:stop]]
        if self._keep is not None:
            picked[~self._keep[start:stop]] = 0
        return picked

    def _weigh(self, selected, weight, columns, column_blocks, scales):
        """Sums of ``z g`` for degree-2 shares of z, each party's times `weight`."""
        s, f = self.session, self.field
        acc, own = f.zeros((columns,)), f.zeros((columns,))
        for start, stop in self._blocks():
            n = stop - start
            z = selected(start, stop)
            g = None
            parts = {STATIC: None, HELPER: None}
            if s.pid == MOVING:
                # Its own term of z meets its own g: nothing needs to be shared.
                g = f.encode(
                    column_blocks(start, stop) * scales.columns, 0, 2.0**SUM_BITS
                )
                f.kernels.weighted_sums(z, g, None, own)
            else:
                parts[s.pid] = f.scale(z, LAGRANGE[s.pid] * weight)
            g = share_elements(s, MOVING, g, (n, columns), f, "columns")
            z = reshare_parts(
                s, parts, (n,), f, frac_bits=0, bound=1 << SUM_BITS, name="part"
            ).share
            f.kernels.weighted_sums(z, g, None, acc)
        acc = f.add(acc, f.scale(own, weight))
        return SharedArray(f, acc, 2, 0, 1 << SUM_BITS)


class Scales:
    """Powers of two by which the moving owner scales rows and columns.

    Attributes
    ----------
    row : float
    columns : array, shape (p,)
    table : float
        scale of the shared table of `Contingency.contract_shared`; else 1.
    """

    def __init__(self, row, columns):
        self.row, self.columns, self.table = row, columns, 1.0

    def undo(self, sums):
        """Real sums of opened integers."""
        return sums / (self.row * self.columns * self.table)


def band_bits(samples, table_bits):
    """Bits of the integers to which the band of `contract_shared` is scaled."""
    left = SUM_BITS - table_bits - max(int(samples), 1).bit_length()
    return left // 2


def choose_scales(row_sum, weighted_sums, row_scale=None, extra=0):
    """Scales that keep every sum of a contraction inside the field.

    A sum of products ``z g`` is exact modulo p, so only the final sum must fit.
    Where the caller can bound z for each sample, it hands in sums weighted with
    these bounds: the tighter they are, the finer the numbers are rounded.

    Parameters
    ----------
    row_sum : float
        sum over the samples of the bound on z.
    weighted_sums : array, shape (p,)
        sum over the samples of the bound on z times the magnitude of g.
    row_scale : float, optional
        scale of the rows; by default rows and columns share the bits so that
        their rounding errors count alike.
    extra : int or array of int, shape (p,), optional
        bits by which a column may exceed what is proven to fit. The true sum is
        usually far smaller than the bound; the caller must check that it was.

    Returns
    -------
    scales : Scales

    Raises
    ------
    FixedPointOverflowError
        if a bound is not finite.
    """
    if not (np.isfinite(row_sum) and np.isfinite(weighted_sums).all()):
        raise FixedPointOverflowError(
            "the gradient of the moving image is not finite; check the image"
        )
    # One bit is kept for the sign, one for what rounding adds to the terms.
    room = SUM_BITS - 2 + np.asarray(extra)
    if row_scale is None:
        half = (room.max() - np.log2(max(row_sum, 1.0))) // 2
        row_scale = 2.0 ** np.clip(half + ROW_SHARE, 1, 40)
    columns = room - np.log2(np.maximum(row_scale * weighted_sums, 2.0**-40))
    return Scales(row_scale, 2.0 ** np.clip(np.floor(columns), -1000, room))
