r"""Sums over samples of two owners' rows, without showing either row.

The static owner knows a category t(x) for each of n samples x, the moving owner
a short band of weights A(x, r). Two sums are computed:

table
    :math:`P(r, t) = \sum_x A(x, r) B(x, t)` with the one-hot rows
    :math:`B(x, t) = [t(x) = t]`;
contraction
    :math:`G_k = \sum_x z(x) g_k(x)`, :math:`z(x) = \sum_t K(x, t) B(x, t)`, for
    rows K and columns g that the moving owner knows.

B is shared once (`share_categories`), A, K and g at every evaluation. All of it
is in the ring of integers modulo 2**64, where a secret is a sum of parts:

- a row X of the moving owner is X_1 + X_2: both owners draw X_1 from their common
  key stream, the helper is sent X_2;
- a row B of the static owner is B_0 + B_2: both owners draw B_0 from another
  stream, the helper is sent B_2.

Each owner knows its own rows and both their parts, which saves a third of the
work of multiplying shares. Of

.. math:: X B = X B_0 + X_1 B_2 + X_2 B_2

the moving owner computes the first term, with its own clear X: five weights a row
instead of a dense random row; the static owner the second, since it dealt B_2; the
helper the third. The product is the sum of the three parties' parts.

=================  ==================================  ===========
step               elements per sample, all links      rounds
=================  ==================================  ===========
share_categories   categories (once)                   1
table              bins + 1                            1 + opening
contract           categories + columns + 2            2 + opening
contract_shared    2 bins + categories + columns + 2   2 + opening
moments            bins + categories + 2 and 12 bytes  3
                   for each of dim components
=================  ==================================  ===========

What each party sees: the static owner the random parts X_1, and the helper's part
of z hidden by a random number; the helper X_2, B_2 and the static owner's part of z,
each hidden by random numbers it does not know; the moving owner B_0 and other
random numbers. All of it is uniform and independent of the secrets, so a simulator
draws it at random. Nothing is opened here.
"""

import numpy as np

from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.errors import FixedPointOverflowError
from dipy_ppir.mpc.fields import R32, R64
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC
from dipy_ppir.mpc.prg import Stream
from dipy_ppir.mpc.protocols import SEED_PARTY
from dipy_ppir.mpc.scratch import Scratch

#: Samples handled at a time: the working set stays in the second-level cache.
BLOCK = 1 << 11
#: Bytes of a group of blocks, of which two may wait at the helper.
AHEAD = 1 << 26
#: The sum of a contraction stays below 2**SUM_BITS.
SUM_BITS = 62
#: No scaled element of a row is larger than 2**ROW_BITS.
ROW_BITS = 50
#: Bits that rows get more than half of: most columns are near zero while their
#: largest elements set the sums, so they need fewer.
ROW_SHARE = 1


#: Most fraction bits of the weights of a table.
TABLE_BITS = {R32: 12, R64: 40}


def table_frac_bits(samples, ring=R64):
    """Fraction bits of the weights of a table over a number of samples.

    Raises
    ------
    FixedPointOverflowError
        if there are too many samples for words of that size.
    """
    left = ring.bits - 2 - max(int(samples), 1).bit_length()
    if left < 4:
        raise FixedPointOverflowError(
            f"{samples:,} samples are too many; use a smaller sampling_proportion"
        )
    return min(TABLE_BITS[ring], left)


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
    ring : WordRing, optional
        of the elements.
    """

    def __init__(self, session, samples, categories, bins, ring=R64):
        self.session, self.field = session, ring
        self.samples, self.categories, self.bins = samples, categories, bins
        self.frac_bits = table_frac_bits(samples, ring)
        self._b = self._rows = None
        self._block_sums = {}
        self._scratch = Scratch()

    def _blocks(self):
        for start in range(0, self.samples, BLOCK):
            yield start, min(start + BLOCK, self.samples)

    def _paced_blocks(self, columns):
        """Blocks of which rows go to the helper, which is not sent too much ahead.

        With many bins its part takes longest: it says when it has done with a group of
        blocks, and the moving owner is no more than two groups ahead.
        """
        s, blocks = self.session, list(self._blocks())
        word = np.zeros(1, dtype=np.uint64)
        size = columns * BLOCK * np.dtype(self.field.dtype).itemsize
        group = max(AHEAD // size, 1)
        for k, block in enumerate(blocks):
            if s.pid == MOVING and k % group == 0 and k >= 2 * group:
                s.network.receive(HELPER, "pace", word)
            yield block
            done, rest = divmod(k + 1, group)
            if s.pid == HELPER and not rest and (done + 1) * group < len(blocks):
                s.network.send(MOVING, "pace", word)

    def _random(self, owner, shape, what):
        """Numbers that hide an owner's rows, drawn by it and its seed party.

        Each in room of its own, so that what hides one thing never takes the place
        of what still hides another.
        """
        s = self.session
        peer = SEED_PARTY[owner] if s.pid == owner else owner
        out = self._scratch("mask of " + what, shape, self.field)
        return s.random_elements(peer, owner, self.field, shape, out=out)

    def _receive(self, peer, name, shape):
        out = self._scratch(name, shape, self.field)
        return self.session.receive_elements(peer, self.field, shape, name, out=out)

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
        s = self.session
        self._index, self._keep = index, keep
        # B_0 at the moving owner, B_2 at the other two.
        self._b = self.field.empty((self.samples, self.categories))
        for start, stop in self._blocks():
            part = self._b[start:stop]
            if s.pid == HELPER:
                s.receive_elements(
                    STATIC, self.field, part.shape, "categories", out=part
                )
                continue
            part[...] = self._random(STATIC, part.shape, "categories")
            if s.pid == MOVING:
                self._block_sums[start] = part.sum(axis=0, dtype=part.dtype)
                continue
            np.negative(part, out=part)
            one = 1 if keep is None else keep[start:stop].astype(part.dtype)
            part[np.arange(stop - start), index[start:stop]] += one
            s.network.send(HELPER, "categories", part)

    def table(self, band=None, *, counted=True, kept=False):
        """Shared table of the weights by bin and category.

        Rounds: 1. Elements: ``bins + 1`` per sample, moving owner to helper, or `bins`.

        Parameters
        ----------
        band : callable, at the moving owner only
            ``band(start, stop, scale)`` returns the weights of those samples as
            integers: `values` (k, w), the first bin `first` (k,), and `keep`
            (k,), which is 1 for samples that count.
        counted : bool, optional
            whether the moving owner may leave samples out; without, `keep` is 1.
        kept : bool, optional
            whether the parties keep what hides the weights, for `moments`.

        Returns
        -------
        table : SharedArray, shape (bins + 1, categories), degree 2
            The last row counts the samples that `keep` keeps.
        """
        s, kernels = self.session, self.field.kernels
        columns = self.bins + counted
        acc, word = self.field.zeros((columns, self.categories)), self.field.dtype
        one = 1 << self.frac_bits
        if kept and self._rows is None and s.pid == HELPER:
            self._rows = self.field.empty((self.samples, self.bins))
        draw = self._drawing(columns)
        for start, stop in self._paced_blocks(columns):
            shape = (stop - start, columns)
            b = self._b[start:stop]
            if s.pid == MOVING:
                values, first, keep = band(start, stop, float(one))
                counts = keep.astype(word) * word(one)
                rows = draw(start, stop)
                kernels.hide_banded(rows, values, first, rows)
                if counted:
                    rows[:, -1] += counts
                s.network.send(HELPER, "band", rows)
                kernels.gram_banded(values, first, b, acc)
                if counted and keep.all():
                    acc[-1] += self._block_sums[start] * word(one)
                elif counted:
                    acc[-1] += counts @ b
                continue
            if s.pid == STATIC:
                rows = draw(start, stop)
            else:
                rows = self._receive(MOVING, "band", shape)
            kernels.gram(rows, b, acc)
            if kept and s.pid == HELPER:
                self._rows[start:stop] = rows[:, : self.bins]
        if not counted:
            acc = np.concatenate([acc, self._counts()[None] * word(one)])
        return SharedArray(self.field, acc, 2, self.frac_bits, self.samples * one)

    def _drawing(self, columns):
        """What draws the numbers that hide the weights, block after block.

        From a key of its own, so that the static owner can draw them once more.
        """
        s = self.session
        if s.pid == HELPER:
            return None
        self._band_key = s.seed_for(MOVING + STATIC - s.pid, b"band"), columns
        return self._redraw()

    def _redraw(self):
        key, columns = self._band_key
        stream = Stream(key)

        def draw(start, stop):
            out = self._scratch("mask of band", (stop - start, columns), self.field)
            if not self.session.threshold:
                out[...] = 0
                return out
            return stream.elements(self.field, out.shape, out)

        return draw

    def _counts(self):
        """This party's part of how many samples each category has."""
        if self.session.pid == MOVING:
            return sum(self._block_sums.values())
        if self.session.pid == HELPER:
            return self.field.zeros((self.categories,))
        return self._b.sum(axis=0, dtype=self.field.dtype)

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

        def own(start, stop):
            return self.field.encode(rows(start, stop) * scales.row, 0, 2.0**ROW_BITS)

        def selected(start, stop, z):
            self._select(start, stop, own, z)

        return self._weigh(selected, columns, column_blocks, scales)

    def contract_shared(
        self, table, columns, band=None, column_blocks=None, scales=None
    ):
        r"""Shared sums of categories' values times columns; K known to nobody.

        Rounds: 2. Elements: ``2 bins + categories + columns + 2`` per sample.

        Parameters
        ----------
        table : SharedArray, shape (bins, categories), degree 2
            in the ring, the helper's part zero.
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
        s = self.session

        def weights(start, stop):
            values, first = band(start, stop, scales.row)
            rows = self._random(MOVING, (stop - start, self.bins), "derivative")
            self.field.kernels.hide_banded(rows, values, first, rows)
            s.network.send(HELPER, "derivative", rows)
            return values, first

        def hidden(start, stop):
            shape = stop - start, self.bins
            if s.pid == STATIC:
                return self._random(MOVING, shape, "derivative")
            return self._receive(MOVING, "derivative", shape)

        selected = self._selecting(table, weights, hidden)
        return self._weigh(selected, columns, column_blocks, scales)

    def _selecting(self, table, weights, hidden):
        r"""Values z of the samples from a table that nobody knows, a block at a time.

        K is the moving owner's band D times a table that the owners hold in two
        parts, W_0 (moving; the helper may know it) and W_1 (static), so that

        .. math:: z(x) = \sum_t B(x, t) (D W_0)(x, t)
                         + \sum_r D(x, r) W_1(r, t(x)).

        The first sum is that of `contract`. The second has rows of both owners
        too: D and the column of W_1 that belongs to the sample's category.

        Parameters
        ----------
        table : SharedArray
        weights : callable
            ``weights(start, stop)`` returns D at the moving owner, values and first
            bins.
        hidden : callable
            ``hidden(start, stop)`` returns the others' parts of D, dense.
        """
        s, kernels = self.session, self.field.kernels
        by_category = np.ascontiguousarray(table.share.T)

        def selected(start, stop, z):
            shape, mine = (stop - start, self.bins), ()
            if s.pid == STATIC:
                v = by_category[self._index[start:stop]]
                if self._keep is not None:
                    v[~self._keep[start:stop]] = 0
                np.subtract(v, self._random(STATIC, shape, "columns of table"), out=v)
                s.network.send(HELPER, "columns-of-table", v)
                kernels.dot_rows(hidden(start, stop), v, z)
            elif s.pid == HELPER:
                v = self._receive(STATIC, "columns-of-table", shape)
                kernels.dot_rows(hidden(start, stop), v, z)
            else:
                mine = weights(start, stop)
                mask = self._random(STATIC, shape, "columns of table")
                kernels.dot_banded(*mine, mask, z)

            def own(start, stop):
                k = self._scratch("k", (stop - start, self.categories), self.field)
                kernels.band_rows(*mine, table.share, k)
                return k

            self._select(start, stop, own, z)

        return selected

    def moments(self, table, positions, dim, band=None, gradient=None):
        r"""Shared sums of selected values times a gradient times positions.

        .. math:: S_{de} = \sum_x z(x)\, g_d(x)\, y_e(x)

        with the weights A of the last `table`, kept, and another table W, the moving
        owner's gradient g and public integers y:

        .. math:: z(x) = \sum_r A(x, r) W(r, t(x)).

        The sums are exact in the ring of 64 bits, though z is in one of 32: the
        static owner and the helper hide their parts of z by numbers r that both know,
        and send them to the moving owner, which so learns :math:`c = z + r` modulo
        2**32 and multiplies it by its g; they multiply r. With z shifted to lie
        between 0 and 2**30, c has wrapped around just where it is below 2**30, which
        the moving owner sees, and r is not below 3 * 2**30, which the others see:
        there 2**32 g is added.

        Rounds: 3. Bytes: ``4 (bins + categories + 2) + 12 dim`` per sample.

        Parameters
        ----------
        table : SharedArray, shape (bins, categories), degree 2
            in the ring of 32 bits, the helper's part zero; such that no z is 2**29 or
            larger in magnitude.
        positions : callable
            ``positions(start, stop)`` returns y, int64, shape (k, e).
        dim : int
            number d of the gradient's components.
        band : callable, at the moving owner only
            that of the table.
        gradient : callable, at the moving owner only
            ``gradient(start, stop)`` returns integers, shape (k, dim), such that the
            sums are below 2**61 in magnitude.

        Returns
        -------
        sums : SharedArray, shape (dim * e,), field R64, degree 2
        """
        s, one = self.session, float(1 << self.frac_bits)
        draw = self._redraw() if s.pid == STATIC else None

        def hidden(start, stop):
            if s.pid == HELPER:
                return self._rows[start:stop]
            return np.ascontiguousarray(draw(start, stop)[:, : self.bins])

        selected = self._selecting(
            table, lambda start, stop: band(start, stop, one)[:2], hidden
        )
        z = self.field.zeros((self.samples,))
        for start, stop in self._blocks():
            selected(start, stop, z[start:stop])
        offset, top, shift = np.uint32(1 << 29), np.uint32(3 << 30), np.uint64(32)
        if s.pid == MOVING:
            z += offset
            for party in (STATIC, HELPER):
                z += self._receive(party, "hidden", z.shape)
        else:
            peer, total = STATIC + HELPER - s.pid, None
            for party in (STATIC, HELPER):
                mask = hidden_mask(s, peer, party, z.shape)
                if party == s.pid:
                    s.network.send(MOVING, "hidden", z + mask)
                total = mask if total is None else total + mask
            z = total
        acc = None
        for start, stop in self._blocks():
            y = positions(start, stop).astype(np.int64).view(np.uint64)
            shape, values = (stop - start, dim), z[start:stop, None]
            if s.pid == MOVING:
                g = gradient(start, stop).astype(np.int64).view(np.uint64)
                small = values < np.uint32(1 << 30)
                wraps = (g * small).astype(np.uint32)
                g_1 = s.random_elements(STATIC, MOVING, R64, shape)
                wraps_1 = s.random_elements(STATIC, MOVING, R32, shape)
                s.network.send(HELPER, "gradient", g - g_1)
                s.network.send(HELPER, "wraps", wraps - wraps_1)
                product = (values.astype(np.uint64) - np.uint64(offset)) * g
            else:
                if s.pid == STATIC:
                    g = s.random_elements(MOVING, MOVING, R64, shape)
                    wraps = s.random_elements(MOVING, MOVING, R32, shape)
                else:
                    g = s.receive_elements(MOVING, R64, shape, "gradient")
                    wraps = s.receive_elements(MOVING, R32, shape, "wraps")
                product = -values.astype(np.uint64) * g
                product += (wraps * (values >= top)).astype(np.uint64) << shift
            sums = product.T @ y
            acc = sums if acc is None else acc + sums
        return SharedArray(R64, acc.reshape(-1), 2, 0, (1 << 61) - 1)

    def _select(self, start, stop, own, z):
        """Add to z the elements of the moving owner's rows at the categories."""
        s, kernels, b = self.session, self.field.kernels, self._b[start:stop]
        if s.pid == STATIC:
            kernels.dot_rows(self._random(MOVING, b.shape, "rows"), b, z)
        elif s.pid == HELPER:
            kernels.dot_rows(self._receive(MOVING, "rows", b.shape), b, z)
        else:
            k = own(start, stop)
            rows = self._random(MOVING, b.shape, "rows")
            s.network.send(HELPER, "rows", np.subtract(k, rows, out=rows))
            kernels.dot_rows(k, b, z)

    def _weigh(self, selected, columns, column_blocks, scales):
        """Sums of ``z g``, g the moving owner's columns, z of three parts.

        The static owner and the helper hide their parts of z by numbers that the
        moving owner draws too, and exchange them: with its own part it knows one
        summand of z, they both know the other. Of g it knows all, they a part each.
        """
        s, kernels = self.session, self.field.kernels
        z = self.field.zeros((self.samples,))
        for start, stop in self._blocks():
            selected(start, stop, z[start:stop])
        if s.pid == MOVING:
            z += self._random(STATIC, z.shape, "static part")
            z += self._random(HELPER, z.shape, "helper part")
        else:
            z -= self._random(s.pid, z.shape, "own part")
            peer = STATIC + HELPER - s.pid
            s.network.send(peer, "part", z)
            z += self._receive(peer, "part", z.shape)
        acc = self.field.zeros((columns,))
        for start, stop in self._blocks():
            shape = (stop - start, columns)
            if s.pid == STATIC:
                g = self._random(MOVING, shape, "columns")
            elif s.pid == HELPER:
                g = self._receive(MOVING, "columns", shape)
            else:
                g = column_blocks(start, stop) * scales.columns
                g = self.field.encode(g, 0, 2.0**SUM_BITS)
                rows = self._random(MOVING, shape, "columns")
                s.network.send(HELPER, "columns", np.subtract(g, rows, out=rows))
            kernels.weighted_sums(z[start:stop], g, acc)
        return SharedArray(self.field, acc, 2, 0, 1 << SUM_BITS)


def hidden_mask(session, peer, party, shape):
    """What hides the part of z of the static owner or the helper; both know both."""
    mask = np.zeros(shape, dtype=np.uint32)
    if session.threshold:
        session.stream(peer, b"selected-%d" % party).fill(mask)
    return mask


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


def band_bits(samples, table_bits, extra=0):
    """Bits of the integers to which the band of `contract_shared` is scaled."""
    left = SUM_BITS + extra - table_bits - max(int(samples), 1).bit_length()
    return left // 2


def choose_scales(row_sum, weighted_sums, row_scale=None, extra=0):
    """Scales that keep every sum of a contraction inside the field.

    A sum of products ``z g`` is exact modulo 2**64, so only the final sum must fit.
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
