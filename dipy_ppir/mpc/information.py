r"""Mutual information of two owners' samples and its gradient, left on shares.

With P(t, r) the joint histogram, w its logarithms and A the Parzen weights (see
`contingency`, `logarithm`),

.. math:: f = -\frac{1}{V} \sum_{t,r} v_{tr} \ln\frac{v_{tr} V}{v_r s_t}, \qquad
          S_{de} = \sum_x z(x)\, g_d(x)\, y_e(x), \quad
          z(x) = -\sum_r A(x, r) \frac{w(t(x), r + 1) - w(t(x), r - 1)}{2},

and the gradient by the transform's parameters is S times a matrix that the moving owner
knows: a transform moves a point by a linear function of its position y, which is
public. So a sample costs the d components of the image's gradient, whatever the number
of parameters.

Eq. 9 of Taiello et al. 2024 has in z derivatives of the weights and the logarithms
themselves. Differences of the logarithms need no second band of weights to be shared,
and are smoother: registrations end no worse for it.

All of it is in words of 32 bits, but for the last sums (64) and what follows: weights
have up to 12 bits, differences of logarithms 11. No sum wraps: the table's because the
weights of a sample sum to one; z because its magnitude is no larger than the largest
difference; S because its owner scales g by the sum of their magnitudes.

Rounds of an evaluation: 13, and 4 where samples may be left out. Bytes per sample on
all links: ``4 bins`` for the table, 4 more where samples may be left out, and ``4 (bins
+ categories + 2) + 12 d`` for S: 412 with 32 bins in 3D, 220 with 16; ``4 categories``
once for every level. Besides, 1.5 kB for each cell of the table.

Nothing is opened.
"""

from typing import NamedTuple

import numpy as np

from dipy_ppir.mpc.arrays import SharedArray, broadcast
from dipy_ppir.mpc.contingency import Contingency
from dipy_ppir.mpc.fields import P127, R32, R128
from dipy_ppir.mpc.ledger import HELPER, MOVING
from dipy_ppir.mpc.literal import LiteralContingency
from dipy_ppir.mpc.logarithm import LARGEST, deal_table, drop, secret_information
from dipy_ppir.mpc.protocols import lift, reduce, share, share_owners, truncate
from dipy_ppir.mpc.smooth import FINE_BITS

#: Fraction bits of the logarithms, and of half their differences.
WEIGHT_BITS, DIFFERENCE_BITS = 10, 11
#: No sum S is 2**SUM_BITS or larger.
SUM_BITS = 61
#: Fraction bits of S / 2**SUM_BITS and of the matrix; no element of that is larger.
PART_DIGITS, MATRIX_DIGITS, LARGEST_ELEMENT = 32, 20, 1 << 26
#: Fraction bits of V f.
TOTAL_DIGITS = 22
#: Fraction bits of the reciprocal of x, see `reciprocal`.
FRACTION_DIGITS = 22
#: No result is larger.
LARGEST_RESULT = 1 << 21
#: V is no smaller part of all samples than the reciprocal of this.
LARGEST_SHARE = 1 << 12


class Moving(NamedTuple):
    """What the moving owner brings to an evaluation.

    Attributes
    ----------
    band : callable
        ``(start, stop, scale)``; see `Contingency.table`.
    gradient : callable
        ``(start, stop)`` returns integers, shape (k, dim).
    matrix : array, shape (p, dim * e)
        of S, with the scale of the gradient and the number of samples taken off.
    """

    band: object
    gradient: object
    matrix: np.ndarray


class Evaluation(NamedTuple):
    """A value and a gradient on shares.

    Attributes
    ----------
    value : SharedArray, shape (1,)
    gradient : SharedArray, shape (p,)
    slopes : SharedArray, shape (bins,), or None
        see ``dipy_ppir.align.quasinewton.mean_slopes``.
    """

    value: SharedArray
    gradient: SharedArray
    slopes: SharedArray = None


class Information:
    """Evaluations of the mutual information over the samples of one level.

    Parameters
    ----------
    session : Session
    samples, categories, bins : int
        public.
    positions : callable
        see `Contingency.moments`; y_e for e up to `dim`, and 1.
    dim : int
    masked : bool
        whether samples may be left out; public.
    digits : int
        fraction bits of what is returned.
    backend : {"packed", "mpyc"}, optional
        what computes the sums over samples: the packed kernels, or MPyC's arrays, which
        is for few samples (`literal`).
    """

    #: Shares are shared anew at each level; see `pairinformation.PairInformation`.
    sent = None

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
        backend="packed",
    ):
        self.session, self.dim, self.digits = session, dim, digits
        self.positions, self.masked = positions, masked
        self._ahead = backend != "mpyc"
        if backend == "mpyc":
            self._sums = LiteralContingency(session, samples, categories, bins)
        else:
            self._sums = Contingency(session, samples, categories, bins, R32)

    def share_categories(self, index=None, keep=None):
        """See `Contingency.share_categories`."""
        self._sums.share_categories(index, keep)

    def evaluate(self, scale, parameters, moving=None, *, slopes=False):
        """Evaluate f times `scale`, and its gradient.

        Parameters
        ----------
        scale : float
            public.
        parameters : int
            number p of the transform's parameters; public.
        moving : Moving, at the moving owner only
        slopes : bool, optional
            whether the slopes are wanted too, which takes 11 rounds more.

        Returns
        -------
        evaluation : Evaluation
        """
        s, sums = self.session, self._sums
        band, gradient, matrix = moving or (None,) * 3

        def deal():
            if s.pid == HELPER:
                size = sums.bins, sums.categories
                return deal_table(s, *size, R32, self.masked, marginal=slopes)
            return None

        # Before the helper waits for the others: they take what it deals when they need
        # it. MPyC's rounds, however, leave no room for other messages.
        masks = deal() if self._ahead else None
        matrix = self._matrix(matrix, scale, parameters)
        with s.phase("histogram"):
            table = sums.table(band, counted=self.masked, kept=True)
            masks = masks if self._ahead else deal()
            found = secret_information(
                s, table, masks, masked=self.masked, marginal=slopes
            )
            differences = self._differences(found.ratio)
            total = found.total()
        with s.phase("gradient"):
            moments = sums.moments(
                differences, self.positions, self.dim, band, gradient
            )
            total, parts = self._to_field(total, lift(s, moments))
            value, gradient = self._scaled(total, parts, matrix, scale)
        inverse = None
        if found.inverse is not None:
            inverse = self._in_field(found.inverse)
        if self.masked:
            with s.phase("samples"):
                value, gradient = self._per_sample(value, gradient, inverse, table)
        marginal = None
        if slopes:
            with s.phase("first curvature"):
                marginal = self._slopes(found, inverse)
        return Evaluation(value, gradient, marginal)

    @property
    def scale_bits(self):
        """Fraction bits of z."""
        return self._sums.frac_bits + DIFFERENCE_BITS

    def _differences(self, ratio):
        """Half the differences of logarithms two bins apart; local.

        At the ends those of neighbours.
        """
        ratio = drop(self.session, ratio, FINE_BITS - WEIGHT_BITS, R32)
        w, out = ratio.share, np.empty_like(ratio.share)
        out[1:-1] = w[:-2] - w[2:]
        out[0], out[-1] = np.uint32(2) * (w[0] - w[1]), np.uint32(2) * (w[-2] - w[-1])
        bound = 2 * LARGEST << DIFFERENCE_BITS
        return SharedArray(R32, out, 2, DIFFERENCE_BITS, bound)

    def _matrix(self, matrix, scale, parameters):
        shape = parameters, self.dim * (self.dim + 1)
        if matrix is not None:
            matrix = matrix * (scale * 2.0 ** (SUM_BITS - self.scale_bits))
        return share(
            self.session,
            MOVING,
            matrix,
            shape,
            frac_bits=MATRIX_DIGITS,
            bound=LARGEST_ELEMENT,
            field=P127,
            name="matrix",
        )

    def _to_field(self, total, moments):
        """V f with `TOTAL_DIGITS`, and S over `SUM_BITS`; rounds: 1."""
        drops = total.frac_bits - TOTAL_DIGITS, SUM_BITS - PART_DIGITS
        most = max(drops)
        arrays = [
            a.times(1 << most - d) for a, d in zip((total, moments), drops, strict=True)
        ]
        joined = SharedArray(
            R128,
            np.concatenate([a.share for a in arrays]),
            2,
            most,
            max(a.bound for a in arrays),
        )
        whole = share_owners(self.session, joined, most, P127)
        total = SharedArray(
            P127, whole[:1].share, 1, TOTAL_DIGITS, (total.bound >> drops[0]) + 1
        )
        parts = SharedArray(
            P127, whole[1:].share, 1, PART_DIGITS, (1 << PART_DIGITS) + 1
        )
        return total, parts

    def _scaled(self, total, parts, matrix, scale):
        """``-total * scale / samples`` and the matrix times the parts; rounds: 2."""
        digits = MATRIX_DIGITS + PART_DIGITS
        factor = round(scale * 2.0 ** (digits - TOTAL_DIGITS) / self._sums.samples)
        value = total.times(-factor)
        gradient = matrix @ parts.reshape(-1, 1)
        # A line is a parabola too.
        both = np.concatenate([value.share, gradient.share[:, 0]])
        both = SharedArray(P127, both, 2, digits, LARGEST_RESULT << digits)
        both = truncate(self.session, both, digits - self.digits)
        return both[:1], both[1:]

    def _in_field(self, inverse):
        """Factors of reciprocals, with `FRACTION_DIGITS` and whole; rounds: 2."""
        s = self.session
        drop = FINE_BITS - FRACTION_DIGITS
        fraction = share_owners(s, inverse.fraction, drop, P127, "fraction-of-inverse")
        return fraction, share_owners(s, inverse.power, 0, P127, "power")

    def _per_sample(self, value, gradient, inverse, table):
        """Both times all samples over those that count, N / V; rounds: 4."""
        fraction, power = (factor[-1:] for factor in inverse)
        # V is counted in units of the table, and 1 / V is to be divided by 2**30.
        product = (fraction * power).times(table.bound)
        digits = FRACTION_DIGITS + R32.bits - 2
        product.bound, product.frac_bits = LARGEST_SHARE << digits, digits
        part = truncate(self.session, product, digits - self.digits)
        both = np.concatenate([value.share, gradient.share])
        both = SharedArray(P127, both, 1, self.digits, LARGEST_RESULT << self.digits)
        both = both * broadcast(part, both.shape)
        both.bound = LARGEST_RESULT << both.frac_bits
        both = truncate(self.session, both, self.digits)
        return both[:1], both[1:]

    def _slopes(self, found, inverse):
        """Mean square slopes of the logarithms for every bin; rounds: 8."""
        s, bins = self.session, found.ratio.shape[0]
        ratio = share_owners(s, found.ratio, FINE_BITS - WEIGHT_BITS, P127, "ratio")
        counts = share_owners(s, found.counts, 0, P127, "counts")
        slope = np.zeros_like(ratio.share)
        slope[1:-1] = P127.sub(
            np.ascontiguousarray(ratio.share[2:]),
            np.ascontiguousarray(ratio.share[:-2]),
        )
        # Half the difference: one place more.
        digits = 2 * (WEIGHT_BITS + 1)
        largest = 2 * LARGEST << WEIGHT_BITS
        slope = SharedArray(P127, slope, 1, WEIGHT_BITS + 1, largest)
        squares = reduce(s, slope * slope)
        weighed = (squares * counts).share
        ones = P127.encode_int(np.ones((weighed.shape[1], 1)))
        sums = P127.matmul(weighed, ones)[:, 0]
        sums = reduce(s, SharedArray(P127, sums, 2, digits, largest**2 << 30))
        fraction, power = (factor[:bins] for factor in inverse)
        # A sum over the row is below largest**2 times the row, which times the power
        # is below 2**32.
        sums = sums * power
        sums.bound = largest**2 << R32.bits
        sums = truncate(s, sums, PART_DIGITS - 8) * fraction
        sums.frac_bits = digits + R32.bits - 2 - (PART_DIGITS - 8) + FRACTION_DIGITS
        return truncate(s, sums, sums.frac_bits - self.digits)
