r"""Mutual information and its gradient for two owners alone, left on shares.

What is computed is that of `information`:

.. math:: f = -\frac{1}{V} \sum_{r,t} v_{rt} \ln\frac{v_{rt} V}{v_r s_t}, \qquad
          S_{de} = \sum_x \sum_r A(x, r)\, W(r, t(x))\, g_d(x)\, y_e(x),

with the histogram v, the moving owner's Parzen weights A and gradient g, the static
owner's categories t(x), of which B are the one-hot rows, and W minus half the
differences of the logarithms of v. Sums over samples are products of one owner's rows
with the other's, on encrypted numbers (`encrypted`), modulo 2**48:

1. The static owner sends B encrypted, once for a static image and a key.
2. :math:`v = A^T B`.
3. Logarithms of the cells, the row sums and the counts (`pairfunctions`), and sums of
   products of numbers on shares (`pairproducts`), modulo 2**128.
4. With the owners' words :math:`W = W_0 + W_1`, and the integers :math:`G_{de}(x, r)`
   that are nearest to :math:`A(x, r) g_d(x) y_e(x)`,

   .. math:: S_{de} = \sum_{x,t} \Big( \sum_r G_{de}(x, r) W_0(r, t) \Big) B(x, t)
                      + \sum_{x,r} G_{de}(x, r) W_1(r, t(x)).

   Of the first sum the moving owner knows what multiplies B. For the second it looks
   up (`lookups`) the four words of each sample that its weights multiply,
   :math:`W_1(r, t(x)) - u_c(x)` with c the rest of r modulo 4, less masks u of the
   static owner's, which this encrypts anew for every evaluation.

No sum wraps: v because the weights of a sample sum to one; S because the moving owner
scales g by the sum of its magnitudes, as for `information`, and :math:`A g y` is
rounded to units of 2**15 of that scale. Dropping digits of a number goes wrong with a
probability of less than 2**-59, and an evaluation drops those of some 3,000: less than
2**-40 in a hundred evaluations.

Rounds of an evaluation: 22 with counts of 18 to 32 bits, the first of which can be
under way while the moving owner is told where to look, 3 more where samples may be left
out, and 6 for the slopes; besides those of what is made ahead. Bytes: those of
encrypted rows (`encrypted`), of `categories` with 1 in each column once for a static
image; for an evaluation of 4 rows of masks anew, with a key of their own, and of what
goes back of ``bins`` rows of weights and, twice, of ``dim (dim + 1)`` sums; and those
of `lookups`. Besides, at most 1.1 kB for each number whose logarithm is taken, and 16
products and 200 transfers that are made ahead. With 32 bins and 45,000 samples in 3D
that is 71 MB once and 32 MB an evaluation, of which 6 are of products made ahead.

What each owner sees: ciphertexts of the other's rows; of what comes back numbers hidden
by a mask (`encrypted`); and uniform numbers and bits (`lookups`, `pairproducts`,
`circuits`). A simulator makes the former of zeros and draws the rest.
Nothing is opened.
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.contingency import table_frac_bits
from dipy_ppir.mpc.encrypted import EncryptedRows
from dipy_ppir.mpc.fields import R32, R64, R128
from dipy_ppir.mpc.information import (
    DIFFERENCE_BITS,
    LARGEST_ELEMENT,
    LARGEST_RESULT,
    LARGEST_SHARE,
    MATRIX_DIGITS,
    SUM_BITS,
    WEIGHT_BITS,
    Evaluation,
)
from dipy_ppir.mpc.ledger import MOVING, ROOM, STATIC
from dipy_ppir.mpc.logarithm import LARGEST, drop
from dipy_ppir.mpc.lookups import WINDOW, Lookups
from dipy_ppir.mpc.pairfunctions import (
    FINE_BITS,
    LOGARITHM,
    RECIPROCAL,
    evaluated,
    lifted,
    normalized,
)
from dipy_ppir.mpc.pairproducts import crossed, multiplied
from dipy_ppir.mpc.protocols import constant

#: Categories are packed for so many evaluations: a level has up to ten, but a line is
#: dearer than a processor.
USES = 5
#: Sums are modulo 2**WORD_BITS, and below 2**(WORD_BITS - 2) in magnitude.
WORD_BITS = 48
#: Binary places of the products of weights, gradient and positions that are dropped.
ROUNDED_BITS = SUM_BITS - (WORD_BITS - 2)
#: Fraction bits of the logarithms that are weighed, and of reciprocals.
LOG_BITS = 30
#: Fraction bits of V f, and of what divides it by the number of samples.
TOTAL_DIGITS, COUNT_DIGITS = 28, 30
#: Fraction bits of S / 2**46.
PART_DIGITS = 32
#: Fraction bits of the power of two in N / V.
SHARE_DIGITS = 16


class Sent(NamedTuple):
    """Categories of a level, as they were sent.

    Attributes
    ----------
    rows : EncryptedRows
    index, keep : array or None
        what they were made of, at the static owner.
    """

    rows: EncryptedRows
    index: np.ndarray | None
    keep: np.ndarray | None


class PairInformation:
    """Evaluations of the mutual information over the samples of one level.

    Parameters
    ----------
    session : PairSession
    samples, categories, bins, positions, dim, masked, digits
        see `information.Information`.
    anew : bool, optional
        whether categories are shared for every evaluation: then they are packed such
        that they cost less to encrypt, and more to multiply.
    sent : Sent, optional
        what another one sent of the same static image at the same samples: it is not
        sent again but with a new key.

    Attributes
    ----------
    sent : Sent or None
        what this one sent, or was given.
    """

    def __init__(
        self,
        session,
        samples,
        categories,
        bins,
        positions,
        dim,
        *,
        masked,
        digits,
        anew=False,
        sent=None,
    ):
        self.session, self.dim, self.digits = session, dim, digits
        self.samples, self.categories, self.bins = samples, categories, bins
        self.positions, self.masked = positions, masked
        self.frac_bits = table_frac_bits(samples, R32)
        options = {"length": samples, "bits": WORD_BITS}
        self.sent, self._again = sent, sent is not None
        self._categories = (
            sent.rows
            if sent
            else EncryptedRows(
                session,
                "categories",
                STATIC,
                rows=categories,
                others=bins + masked,
                uses=1 if anew else USES,
                **options,
            )
        )
        self._masks = EncryptedRows(
            session, "masks", STATIC, rows=WINDOW, uses=1, **options
        )
        self._lookups = Lookups(session, rows=bins, **options)
        self._index = self._keep = None

    @property
    def scale_bits(self):
        """Fraction bits of the sums by samples, as in `information`."""
        return self.frac_bits + DIFFERENCE_BITS

    def share_categories(self, index=None, keep=None):
        """Send the static owner's one-hot rows, encrypted. Rounds: 1.

        Rounds: 0 if they were sent before. With a new key they go by `evaluate`.

        Parameters
        ----------
        index, keep
            see `Contingency.share_categories`.

        Raises
        ------
        ValueError
            at the static owner, if what was sent before was made of others.
        """
        self._index, self._keep = index, keep
        if self._again:
            if not all(map(_same, (index, keep), self.sent[1:])):
                raise ValueError(
                    "the static image or its mask changed during a registration; "
                    "register each image by a call of its own"
                )
            return
        hot = None if index is None else partial(self._hot, index, keep)
        self._categories.encrypt(hot)
        self.sent = Sent(self._categories, index, keep)

    def _hot(self, index, keep, start, stop):
        """One-hot rows of some samples; at the static owner."""
        hot = np.arange(self.categories)[:, None] == index[start:stop]
        return (hot if keep is None else hot & keep[start:stop]).astype(np.int64)

    def evaluate(self, scale, parameters, moving=None, *, slopes=False):
        """Evaluate f times `scale`, and its gradient; see `Information.evaluate`."""
        s = self.session
        band, gradient, matrix = moving or (None,) * 3
        # After an evaluation a step is opened, and its size in as many bits.
        self._categories.renew(ROOM["step"] * (1 + parameters))
        with s.phase("histogram"):
            # All at once, and not whenever some are missing.
            s.multiplications.reserve(self.products(parameters))
            begun = self._begin_lookups(band)
            table = self._table(band)
            numbers = _Numbers(self, table)
            differences = numbers.differences()
            value = self._mean(numbers.total(), scale)
        with s.phase("gradient"):
            sums = self._moments(differences, begun, band, gradient)
            gradient = self._by_parameters(sums, matrix, scale, parameters)
        if self.masked:
            with s.phase("samples"):
                value, gradient = self._per_sample(value, gradient, numbers)
        marginal = None
        if slopes:
            with s.phase("first curvature"):
                marginal = numbers.slopes(differences, self.digits)
        return Evaluation(value, gradient, marginal)

    def products(self, parameters):
        """How many products are made ahead for an evaluation, but for few."""
        sums = self.dim * (self.dim + 1)
        weighed = self.bins * self.categories + self.masked
        numbers = weighed + self.bins + self.categories + self.masked
        # To normalize a number, and for a polynomial; see `pairfunctions`.
        each = 2 + 2 * (len(LOGARITHM) - 1) - 1
        return each * numbers + 3 * weighed + (1 + parameters) * sums

    # -- sums over samples -------------------------------------------------

    def _table(self, band):
        """Words of the table, and below it of the counts.

        Returns
        -------
        table : array of uint64, shape (bins + 1, categories)
        """
        one = 1 << self.frac_bits

        def rows(start, stop):
            values, first, keep = band(start, stop, float(one))
            weights = _dense(values, first, self.bins)
            counts = [keep.astype(np.int64) * one] if self.masked else []
            return np.concatenate([weights, *map(np.atleast_2d, counts)])

        moving = self.session.pid == MOVING
        table = self._categories.products(
            self.bins + self.masked, rows if moving else None
        )
        if not self.masked:
            counts = np.zeros(self.categories, np.uint64)
            if not moving:
                counts = np.bincount(self._index, minlength=self.categories)
                counts = counts.astype(np.uint64) * np.uint64(one)
            table = np.concatenate([table, counts[None]])
        return table

    def _begin_lookups(self, band):
        """Send masks, and hide which words of columns are looked up. Rounds: 2.

        The masks have a key of their own. An answer can be made of all that a key has
        encrypted: were that the masks, the static owner's part of the table could be
        made of them, and so the words that they are to hide.
        """
        self.session.encryption.make_key(STATIC)

        def first(start, stop):
            _, first, _ = _window(*band(start, stop, float(1 << self.frac_bits)))
            return first

        if self.session.pid == MOVING:
            self._masks.encrypt()
            return self._lookups.begin(first)
        masks = self._lookups.draw()
        self._masks.encrypt(masks.view(np.int64))
        return self._lookups.begin(masks=masks)

    def _moments(self, table, begun, band, gradient):
        """Parts of the sums S; rounds: 2.

        Parameters
        ----------
        table : array of uint64, shape (bins, categories)
            words of W.
        begun : list
            what `_begin_lookups` returned.

        Returns
        -------
        sums : SharedArray, shape (dim * (dim + 1),), field R128
        """
        s, count = self.session, self.dim * (self.dim + 1)
        if s.pid == STATIC:
            self._lookups.look_up(begun, lambda *at: self._of_samples(table, *at))
            first = self._categories.contractions(count)
            second = self._masks.contractions(count)
        else:
            found = self._lookups.look_up(begun)
            known = np.zeros(count, np.uint64)

            def weights(start, stop):
                return self._products(band, gradient, start, stop)

            def selected(start, stop):
                return np.stack(
                    [
                        _selected(values, first, table)
                        for values, first in weights(start, stop)
                    ]
                )

            def columns(start, stop):
                rows = np.stack(
                    [_by_class(*of_one).T for of_one in weights(start, stop)]
                )
                sums = (rows.view(np.uint64) * found[start:stop].T).sum(axis=(1, 2))
                np.add(known, sums, out=known)
                return rows

            first = self._categories.contractions(count, selected)
            second = self._masks.contractions(count, columns)
            second = second + known
        part = lifted(s, first + second, WORD_BITS)
        return SharedArray(R128, part, 2, WORD_BITS - 2, 1 << WORD_BITS - 2)

    def _of_samples(self, table, start, stop):
        """The static owner's words of the columns of some samples' categories."""
        columns = table[:, self._index[start:stop]]
        if self._keep is None:
            return columns
        return columns * self._keep[start:stop].astype(np.uint64)

    def _products(self, band, gradient, start, stop):
        """Weights times gradient times positions, for d and e in turn.

        Yields
        ------
        values : array of int64, shape (k, WINDOW)
        first : array of int32, shape (k,)
        """
        values, first, _ = _window(*band(start, stop, float(1 << self.frac_bits)))
        values, half = values.astype(np.int64), 1 << ROUNDED_BITS - 1
        y = self.positions(start, stop)
        for g in gradient(start, stop).T:
            for column in y.T:
                product = values * (g * column)[:, None]
                yield (product + half) >> ROUNDED_BITS, first

    # -- what follows ------------------------------------------------------

    def _mean(self, total, scale):
        """``-total * scale / samples``; local."""
        factor = round(scale * 2.0**COUNT_DIGITS / self.samples)
        value = total.times(-factor)
        digits = TOTAL_DIGITS + COUNT_DIGITS
        value = SharedArray(R128, value.share, 2, digits, LARGEST_RESULT << digits)
        return drop(self.session, value, digits - self.digits, R128)

    def _by_parameters(self, sums, matrix, scale, parameters):
        """The moving owner's matrix times the sums; rounds: 1."""
        s, width = self.session, self.dim * (self.dim + 1)
        sums = drop(s, sums, WORD_BITS - 2 - PART_DIGITS, R128).share
        sums = np.ascontiguousarray(np.broadcast_to(sums, (parameters, width, 2)))
        mine = sums
        if s.pid == MOVING:
            matrix = matrix * (scale * 2.0 ** (SUM_BITS - self.scale_bits))
            mine = R128.encode(matrix, MATRIX_DIGITS, LARGEST_ELEMENT)
        products = crossed(s, R128.flat(mine))
        if s.pid == MOVING:
            products = R128.add(products, R128.flat(R128.mul(mine, sums)))
        digits = MATRIX_DIGITS + PART_DIGITS
        gradient = _sums(products.reshape(parameters, width, 2))
        gradient = SharedArray(R128, gradient, 2, digits, LARGEST_RESULT << digits)
        return drop(s, gradient, digits - self.digits, R128)

    def _per_sample(self, value, gradient, numbers):
        """Both times all samples over those that count, N / V; rounds: 3."""
        s = self.session
        part = numbers.samples_per_count(self.digits).share
        both = np.concatenate([value.share, gradient.share])
        part = np.ascontiguousarray(np.broadcast_to(part, both.shape))
        both = multiplied(s, both, part)
        digits = 2 * self.digits
        both = SharedArray(R128, both, 2, digits, LARGEST_RESULT << digits)
        both = drop(s, both, self.digits, R128)
        return both[:1], both[1:]


class _Numbers:
    """The numbers of a table whose logarithms are taken, and what comes of them.

    The cells; T, their sum, if samples may be left out; the row sums; the counts; and
    the number V of samples if some may be left out.

    Parameters
    ----------
    information : PairInformation
    table : array of uint64, shape (bins + 1, categories)
        words; the last row are the counts.
    """

    def __init__(self, information, table):
        self._session = s = information.session
        self._shape = bins, categories = len(table) - 1, table.shape[1]
        self._masked, self._frac_bits = information.masked, information.frac_bits
        self._most = information.samples << information.frac_bits
        rows, counts = table[:-1].sum(axis=1), table[-1]
        mass, valid = (
            [a.sum(keepdims=True)] if self._masked else [] for a in (rows, counts)
        )
        self._weighed = np.concatenate([table[:-1].reshape(-1), *mass])
        size = len(self._weighed)
        self._cells = slice(0, bins * categories)
        self._rows = slice(size, size + bins)
        self._counts = slice(size + bins, size + bins + categories)
        # One unit in the last place is added to every number, so that none is zero.
        words = np.concatenate([self._weighed, rows, counts, *valid])
        if s.pid == MOVING:
            words = words + np.uint64(1)
        self._bits = (self._most + 1).bit_length()
        self._parts = normalized(
            s, words & np.uint64((1 << self._bits) - 1), self._bits
        )
        (logs,) = evaluated(s, self._bits, (self._parts.fraction, LOGARITHM))
        ln_2 = round(np.log(2.0) * 2.0**FINE_BITS)
        powers = self._parts.of_place([k * ln_2 for k in range(self._bits)])
        self._logs = R128.add(logs, powers)
        self._ratio = R128.sub(
            self._table(self._cells), self._spread(self._logs[self._rows], 1)
        )
        self._exact = lifted(s, self._weighed, WORD_BITS)

    def _table(self, place):
        return self._logs[place].reshape(*self._shape, 2)

    def _spread(self, part, axis):
        full = np.broadcast_to(np.expand_dims(part, axis), (*self._shape, 2))
        return np.ascontiguousarray(full)

    def _rounded(self, part, largest, digits):
        """Logarithms with fewer digits."""
        array = SharedArray(R128, part, 2, FINE_BITS, largest << FINE_BITS)
        return drop(self._session, array, FINE_BITS - digits, R128)

    def differences(self):
        """Minus half the differences of logarithms two bins apart; local.

        At the ends those of neighbours.

        Returns
        -------
        words : array of uint64, shape (bins, categories)
        """
        w = self._rounded(self._ratio, LARGEST, WEIGHT_BITS).share[..., 0]
        out = np.empty_like(w)
        out[1:-1] = w[:-2] - w[2:]
        out[0], out[-1] = (w[0] - w[1]) * np.uint64(2), (w[-2] - w[-1]) * np.uint64(2)
        return out

    def total(self):
        """V times the mutual information, with `TOTAL_DIGITS`. Rounds: 1."""
        s = self._session
        inner = R128.sub(self._ratio, self._spread(self._logs[self._counts], 0))
        weights = inner.reshape(-1, 2)
        # Near zero where T and V are as large as they can be.
        shift = round(np.log(self._most) * 2.0**FINE_BITS)
        shift = constant(R128, shift if s.pid == MOVING else 0, weights)
        weights = R128.add(weights, shift)
        if self._masked:
            last = R128.sub(np.ascontiguousarray(self._logs[-1:]), shift[:1])
            weights = np.concatenate([weights, last])
        weights = self._rounded(weights, 4 * LARGEST, LOG_BITS)
        total = _sums(multiplied(s, self._exact, weights.share)[None])
        digits = self._frac_bits + LOG_BITS
        total = SharedArray(R128, total, 2, digits, self._most * weights.bound)
        return drop(s, total, digits - TOTAL_DIGITS, R128)

    def _inverses(self, place):
        """Reciprocals of x of some numbers, with `LOG_BITS`. Rounds: 1."""
        some = self._parts.fraction[place], RECIPROCAL
        (part,) = evaluated(self._session, self._bits, some)
        return self._rounded(part, 1, LOG_BITS).share

    def samples_per_count(self, digits):
        """All samples over those that count, N / V. Rounds: 2."""
        s = self._session
        last = slice(len(self._parts.fraction) - 1, None)
        most = LARGEST_SHARE << SHARE_DIGITS + 1
        values = [
            min(self._most * 2.0 ** (SHARE_DIGITS - k), most) for k in range(self._bits)
        ]
        power = self._parts.of_place([round(v) for v in values])[last]
        share = multiplied(s, self._inverses(last), np.ascontiguousarray(power))
        most_digits = LOG_BITS + SHARE_DIGITS
        array = SharedArray(R128, share, 2, most_digits, most << LOG_BITS)
        return drop(s, array, most_digits - digits, R128)

    def slopes(self, differences, digits):
        """Mean square slopes of the logarithms for every bin. Rounds: 5.

        Parameters
        ----------
        differences : array of uint64, shape (bins, categories)
            what `differences` returned.
        digits : int
            fraction bits of the result.

        Returns
        -------
        slopes : SharedArray, shape (bins,)
        """
        s, (bins, categories) = self._session, self._shape
        inner = slice(categories, (bins - 1) * categories)
        largest = 2 * LARGEST << DIFFERENCE_BITS
        slope = lifted(s, differences.reshape(-1)[inner], WORD_BITS)
        squares = multiplied(s, slope, slope)
        # Cells with the unit that was added to them.
        weighed = R128.add(multiplied(s, squares, self._exact[inner]), squares)
        sums = R128.zeros((bins,))
        sums[1:-1] = _sums(weighed.reshape(bins - 2, categories, 2))
        power = np.ascontiguousarray(self._parts.power[self._rows])
        sums = multiplied(s, sums, power)
        # A sum over the row is below largest**2 times the row, which times the power
        # is below 2**bits.
        fraction = 2 * DIFFERENCE_BITS + self._bits - 1
        array = SharedArray(R128, sums, 2, fraction, largest**2 << self._bits)
        array = drop(s, array, fraction - LOG_BITS, R128)
        product = multiplied(s, array.share, self._inverses(self._rows))
        bound = array.bound << LOG_BITS
        array = SharedArray(R128, product, 2, 2 * LOG_BITS, bound)
        return drop(s, array, 2 * LOG_BITS - digits, R128)


def _same(some, others):
    """Whether two arrays, or Nones, are the same."""
    if some is None or others is None:
        return some is others
    return np.array_equal(some, others)


def _window(values, first, keep):
    """Of bands of 4 or 5 numbers, of which no more are not zero, the `WINDOW` these
    are among."""
    if values.shape[1] > WINDOW:
        late = values[:, 0] == 0
        places = late[:, None] + np.arange(WINDOW)
        values, first = np.take_along_axis(values, places, axis=1), first + late
    return values, first, keep


def _by_class(values, first):
    """Numbers of rows from the first on, in the order of these modulo `WINDOW`."""
    places = (np.arange(WINDOW) - first[:, None]) % WINDOW
    return np.ascontiguousarray(np.take_along_axis(values, places, axis=1))


def _dense(values, first, bins):
    """A banded matrix with all of its columns, transposed: shape (bins, k)."""
    out = np.zeros((len(first), bins), np.int64)
    columns = first[:, None] + np.arange(values.shape[1])
    np.put_along_axis(out, columns, values, axis=1)
    return out.T


def _selected(values, first, table):
    """A banded matrix times a table of words, transposed: shape (categories, k)."""
    out = np.empty((len(first), table.shape[1]), np.uint64)
    R64.kernels.band_rows(values, first, table, out)
    return _centred(out).T


def _centred(words):
    """The integers nearest to zero that words stand for, modulo 2**WORD_BITS."""
    spare = np.uint64(64 - WORD_BITS)
    return (words << spare).view(np.int64) >> np.int64(spare)


def _sums(parts):
    """Sums over the last axis of shares modulo 2**128, shape (n, m, 2)."""
    ones = R128.encode_int(np.ones(parts.shape[1]))
    rows = np.ascontiguousarray(parts)
    return np.concatenate([R128.dot(row, ones) for row in rows])
