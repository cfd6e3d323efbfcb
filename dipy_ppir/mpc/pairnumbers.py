r"""Fixed-point numbers on shares of two owners alone, for an optimizer of few numbers.

What `numbers.SecretNumbers` does with a helper, between two: the verbs, and what is
opened, are the same. The numbers are sums of two words modulo 2**128. Products are of
factors made ahead (`pairproducts`); low digits are dropped by each owner on its own;
comparisons, rounding and the highest bit of a number are circuits on its bits
(`circuits`).

Rounds, bytes both ways, and what is made ahead: products of two owners' factors
(`multiplications`) and transfers (`transfers`), for n numbers, m times eight:

===========  ======  ===========================  ========  ==========================
verb         rounds  bytes                        products  transfers
===========  ======  ===========================  ========  ==========================
`own`        0       0                            0         0
`dots`       1       64 n k                       2 n k     0
`times`      1       64 n                         2 n       0
`outer`      1       64 n                         2 n       0
`gates`      1       64 n                         2 n       0
`either`     1       64 n                         2 n       0
`product`    1       64 n k                       2 n k     0
`moved`      2       128 n k                      4 n k     0
`mean`       0       0                            0         0
`less`       8       499 m + 16 n                 0         1496 m + n
`inverses`   20      1410 m + 2366 n              18 n      2824 m + 111 n
`limited`    24      1975 + 474 m + 709 n         3 n       2859 + 1080 m + 38 n
`show_step`  26      1894 + 224 m + 121 n         3 n       2853 + 504 m + 5 n
===========  ======  ===========================  ========  ==========================

k are the terms of a sum. Of a step, n are its components, and what is opened is
counted. To show a bit, a value or a matrix takes 1 round, and 16, 16 and 8 bytes for a
number.

What each owner sees before an opening is uniform, see `pairproducts` and `circuits`. An
opening of a number sends the receiver the other owner's part of it, which is the number
less the part that the receiver has: a simulator computes it from the number. Where
digits were dropped the number was rounded up or down by what the receiver's part was,
which it knows: as good as a dither that is known, and no more bits than are counted. A
step's components and exponent are rounded by circuits that have no other results than
those which are counted, whatever goes in. Of a matrix and of a value what is below the
last digit is noise of the static owner's, or was dropped.

The owners keep to the protocol. One that changes what it sends here can change a number
before it is opened, by a multiple of what the other has, and so choose what the bits
are about; but numbers are opened so far up in their ring that there is no room above
them: of a bit one bit is sent, of an exponent 4, of a component 5, of a value 14. One
that deviates where products are made can make these bits digits of a key, see `bfv`.

Magnitudes are promised, not checked, as in `numbers`. Digits of a number x are dropped
wrongly with probability ``|x| / 2**128``, x counted in units of its last place.
`PairNumbers.failures` adds up what that comes to if every number is as large as
promised: 44 evaluations of an affine registration stay below 2**-42, as many hidden
steps below 2**-41.

**Reciprocals.** With k the place of v's highest bit, :math:`x = v 2^{-k-1}` lies
between 1/2 and 1. With :math:`e_0 = 1 - x y_0`, which a line :math:`y_0` makes less
than 0.07,

.. math:: \frac 1 x = \frac{y_0}{1 - e_0}
          \approx y_0 (1 + e_0) (1 + e_0^2) (1 + e_0^4)

to :math:`e_0^8 < 4 \cdot 10^{-10}` (Goldschmidt 1964), and :math:`1 / v` is that times
:math:`2^{-k-1}`, a function of k.
"""

from itertools import zip_longest
import math

import numpy as np

from dipy_ppir.mpc import circuits
from dipy_ppir.mpc.arrays import SharedArray, broadcast
from dipy_ppir.mpc.errors import FixedPointOverflowError
from dipy_ppir.mpc.fields import R32, R64, R128
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.numbers import (
    ASCENT_BITS,
    DIRECTION_DIGITS,
    LARGEST_DIRECTION,
    LARGEST_MOTION,
    LARGEST_VALUE,
    LOW,
    OWN_MAGNITUDE,
    PART_DIGITS,
    VALUE_BITS,
    VALUE_PLACES,
    SharedNumbers,
)
from dipy_ppir.mpc.pairproducts import multiplied, shifted, squared
from dipy_ppir.mpc.protocols import SECURITY, blur, constant

#: No result is larger than this.
MAGNITUDE = 1 << 24
#: Numbers whose highest bit is looked for are below 2**SIZE_BITS.
SIZE_BITS = 62
#: Differences of fewer bits are compared rightly.
COMPARED_BITS = 64
#: Fraction bits of components to be rounded.
ROUNDED_DIGITS = 11
#: Fraction bits of numbers of which a reciprocal is made, and of that.
RECIPROCAL_DIGITS, FRACTION_DIGITS = 32, 23
#: y_0 = (LINE_START - LINE_SLOPE x) / 2**LINE_DIGITS
LINE_START, LINE_SLOPE, LINE_DIGITS = 181, 120, 6
#: Fraction bits of a hidden step before it is put to use.
MOTION_DIGITS = 36
#: The square of a step has no more, its fraction included.
SQUARED_BITS = 2 * ASCENT_BITS + 4


class PairNumbers(SharedNumbers):
    """Numbers on shares of two owners; see `numbers.SecretNumbers`.

    Parameters
    ----------
    session : PairSession
    **options
        see `SharedNumbers`.

    Attributes
    ----------
    failures : float
        bound on the expected number of roundings that went wrong so far, if all numbers
        were as large as promised.
    """

    def __init__(self, session, **options):
        super().__init__(session, **options)
        self.failures = 0.0

    def own(self, x, shape, digits=None, bound=OWN_MAGNITUDE, owner=MOVING):
        """Numbers that an owner knows: its part is they, the other's is zero."""
        digits = self.digits if digits is None else digits
        part = R128.zeros(shape)
        if self.session.pid == owner:
            x = np.asarray(x, dtype=np.float64)
            if x.shape != tuple(shape):
                raise ValueError(f"expected an array of shape {shape}, got {x.shape}")
            part = R128.encode(x, digits, bound)
        return SharedArray(R128, part, 2, digits, int(np.ceil(bound * 2.0**digits)))

    def public(self, x):
        """Numbers that both know."""
        return self.own(x, np.shape(x))

    def raised(self, x):
        """1 + x."""
        return self._plus(x, 1 << x.frac_bits)

    def _plus(self, x, integer):
        """Sum with a public integer, in units of the last place."""
        share = x.share
        if self.session.pid == MOVING:
            share = R128.add(share, constant(R128, integer, share))
        return x._with(share, bound=x.bound + abs(integer))

    # -- products ----------------------------------------------------------

    def dots(self, *pairs, digits=()):
        """Matrix and inner products; digits each has if not those of all."""
        pairs = [
            (a if len(a.shape) == 2 else a.reshape(1, -1), b.reshape(-1, 1))
            for a, b in pairs
        ]
        products = [a.reshape(-1) for a in self._matrices(*pairs)]
        return self._truncated(products, digits)

    def times(self, *pairs, bounds=()):
        """Elementwise products, and a bound on each if not that of all."""
        return self._truncated(self._products(pairs, bounds), ())

    def outer(self, a, b):
        """Half of the outer products, ``(a b' + b a') / 2``."""
        n = len(a.share)
        pair = broadcast(a.reshape(n, 1), (n, n)), broadcast(b.reshape(1, n), (n, n))
        (product,) = self._products([pair], [OWN_MAGNITUDE])
        product.frac_bits += 1
        (half,) = self._truncated([product], ())
        return half + half._with(np.ascontiguousarray(half.share.swapaxes(0, 1)))

    def gates(self, *pairs):
        """Products with bits, exact."""
        products = self._products(pairs)
        for product, (_, x) in zip(products, pairs, strict=True):
            # What is added up step by step is not larger for it.
            product.bound = min(x.bound, MAGNITUDE << x.frac_bits)
        return products

    def product(self, matrix, right):
        """A matrix and another one before it, exact; to be shown.

        Rounds: 1.

        Parameters
        ----------
        matrix, right : SharedArray, shape (dim, dim + 1)
            of both the last row is left out, which is that of the identity.
        """
        (product,) = self._matrices((matrix[:, :-1], right), bound=OWN_MAGNITUDE)
        shift = matrix.times(1 << right.frac_bits).share.copy()
        shift[:, :-1] = 0
        return product._with(R128.add(product.share, shift))

    def _product(self, a, b, halved):
        """Matrix product, divided by ``2**halved``."""
        (product,) = self._matrices((a, b), bound=OWN_MAGNITUDE)
        product.frac_bits += halved
        return self._truncated([product], ())[0]

    def _matrices(self, *pairs, bound=MAGNITUDE):
        """Matrix products, with the digits of both factors. Rounds: 1."""
        factors = []
        for a, b in pairs:
            shape = a.shape[0], b.shape[1], a.shape[1]
            columns = b._with(np.ascontiguousarray(b.share.swapaxes(0, 1)))
            left = a.reshape(shape[0], 1, shape[2])
            right = columns.reshape(1, shape[1], shape[2])
            factors.append((broadcast(left, shape), broadcast(right, shape)))
        products = self._products(factors, [bound] * len(pairs))
        return [x._with(_summed(x.share)) for x in products]

    def _products(self, pairs, bounds=()):
        """Elementwise products, with the digits of both factors. Rounds: 1."""
        pairs = [
            [broadcast(x, np.broadcast_shapes(a.shape, b.shape)) for x in (a, b)]
            for a, b in pairs
        ]
        left = np.concatenate([_flat(a) for a, _ in pairs])
        right = np.concatenate([_flat(b) for _, b in pairs])
        part, products, start = multiplied(self.session, left, right), [], 0
        for (a, b), bound in zip_longest(pairs, bounds, fillvalue=MAGNITUDE):
            stop = start + math.prod(a.shape)
            digits = a.frac_bits + b.frac_bits
            share = part[start:stop].reshape(a.share.shape)
            products.append(SharedArray(R128, share, 2, digits, int(bound) << digits))
            start = stop
        return products

    def _truncated(self, products, digits):
        """All with the digits that they shall have; local."""
        given = zip_longest(products, digits, fillvalue=self.digits)
        return [self._dropped(a, a.frac_bits - d) for a, d in given]

    def _dropped(self, x, bits):
        """A number without its low bits; local."""
        self._risk(x)
        share = shifted(self.session, x.share, bits)
        bound = (x.bound >> bits) + 1
        return SharedArray(R128, share, 2, x.frac_bits - bits, bound)

    def _risk(self, x):
        """Count how likely it is that digits of numbers are dropped wrongly."""
        if x.bound >> R128.bits - SECURITY:
            raise FixedPointOverflowError(
                f"digits of numbers of {x.bound.bit_length()} bits could be dropped "
                f"wrongly more often than once in 2^{SECURITY}; use fewer fraction "
                "bits"
            )
        self.failures += math.prod(x.shape) * x.bound / R128.modulus

    # -- what is not linear ------------------------------------------------

    def less(self, *pairs):
        """For each pair whether the first is less: a bit on shares."""
        differences = [(a - b).reshape(-1) for a, b in pairs]
        whole = np.concatenate([x.share for x in differences])
        below = circuits.negative(self.session, whole, R128, COMPARED_BITS)
        bits = circuits.arithmetic(self.session, below, R128, len(whole))
        return _parted(SharedArray(R128, bits, 2, 0, 1), differences)

    def inverses(self, *numbers, digits=None):
        """Reciprocals of positive numbers of the same digits."""
        digits = self.digits if digits is None else digits
        given = numbers[0].frac_bits
        share = np.concatenate([_flat(x) for x in numbers])
        v = SharedArray(R128, share, 2, 0, (1 << SIZE_BITS) - 1)
        v = self._plus(v, int(self.floor * 2**given) + 1)
        places = range(SIZE_BITS)
        scale, power = self._functions(
            self._highest(v.share),
            len(share),
            [1 << SIZE_BITS - 1 - k for k in places],
            [1 << d if d >= 0 else 0 for d in (given + digits - k for k in places)],
        )
        (x,) = self._products([(v, scale)], [1 << SIZE_BITS])
        x.frac_bits = SIZE_BITS
        fraction = self._reciprocal(self._dropped(x, SIZE_BITS - RECIPROCAL_DIGITS))
        fraction = self._dropped(fraction, RECIPROCAL_DIGITS - FRACTION_DIGITS)
        power.frac_bits = digits + 1
        (inverse,) = self._products([(fraction, power)], [1 / self.floor])
        return _parted(self._dropped(inverse, FRACTION_DIGITS + 1), numbers)

    def _reciprocal(self, x):
        """Of numbers between 1/2 and 1. Rounds: 4."""
        y = self._plus(x.times(-LINE_SLOPE), LINE_START << x.frac_bits)
        y.frac_bits += LINE_DIGITS
        (product,) = self._products([(x, y)], [1])
        e = self.complement(self._dropped(product, y.frac_bits))
        y = self._dropped(y, LINE_DIGITS)
        for _ in range(3):
            change, e = self._products([(y, e), (e, e)], [1, 1])
            y = y + self._dropped(change, x.frac_bits)
            e = self._dropped(e, x.frac_bits)
        return y

    def _highest(self, words):
        """The highest bit of positive numbers, as one of `SIZE_BITS`."""
        bits = circuits.bits_of(self.session, words, R128, SIZE_BITS)
        return circuits.highest(self.session, bits)

    def _functions(self, onehot, n, *functions):
        """Public functions, integers from 0, of the bit that is set. Rounds: 1."""
        rows = [circuits.position(onehot, values) for values in functions]
        words = circuits.arithmetic(self.session, np.concatenate(rows), R128, n)
        results, start = [], 0
        for row, values in zip(rows, functions, strict=True):
            share = _weighted(words[start : start + len(row)])
            results.append(SharedArray(R128, share, 2, 0, max(values)))
            start += len(row)
        return results

    # -- steps that are not shown ------------------------------------------

    def limited(self, ascent, parts, directions):
        """A part of the quasi-Newton step, by its size; see `ClearNumbers.limited`."""
        ascent = self._in_range(ascent, ASCENT_BITS)
        unit = 1 << PART_DIGITS
        (c,) = self._by_size(ascent, [round(x * unit) for x in parts[:SIZE_BITS]])
        c.frac_bits = PART_DIGITS
        (vector,) = self._products([(c, -ascent)], [LARGEST_MOTION])
        vector = self._dropped(vector, vector.frac_bits - MOTION_DIGITS)
        flat = directions.reshape(len(directions), -1).T
        motion = SharedArray(
            R128, _transformed(flat, vector.share), 2, vector.frac_bits, vector.bound
        )
        tilt, back = vector.times(1), vector.times(round(-parts[0] * unit))
        tilt.frac_bits += self.tilt_bits
        motion.frac_bits += DIRECTION_DIGITS
        back.frac_bits += PART_DIGITS
        for x in (motion, back):
            x.bound = LARGEST_MOTION << x.frac_bits
        vector, tilt, back, motion = self._truncated([vector, tilt, back, motion], ())
        part = self.public(parts[:1])
        return vector, tilt, part, back, motion.reshape(directions.shape[1:])

    def _in_range(self, x, bits):
        """The same numbers below ``2**bits``; else others, as small."""
        part = circuits.bits_of(self.session, x.share, R128, bits + 1)
        words = circuits.arithmetic(self.session, part, R128, len(x.share))
        top = R128.scale(words[-1], 1 << bits)
        share = R128.sub(_weighted(words[:-1]), top)
        return x._with(share, bound=1 << bits)

    def _by_size(self, u, *functions):
        """Functions of the highest bit of ``u @ u``, with `square_digits`."""
        part = squared(self.session, u.share)
        square = SharedArray(
            R128, _summed(part[None]), 2, 2 * u.frac_bits, (1 << SQUARED_BITS) - 1
        )
        square = self._dropped(square, square.frac_bits - self.square_digits)
        onehot = self._highest(self._plus(square, 1).share)
        return self._functions(onehot, 1, *functions)

    # -- what is opened ----------------------------------------------------

    def show_bit(self, bit, label, receivers):
        """Show a bit; None where it is not shown. Rounds: 1."""
        return super().show_bit(_topmost(bit, 1), label, receivers)

    def show_step(self, u):
        """Show the moving owner a step's exponent and its rounded components.

        Returns
        -------
        exponent : int
        mantissas : array of int, shape (p,)
            both None elsewhere.
        """
        least, largest = self.exponents
        sizes = largest - least + 1
        exponent, power = self._size_of(u)
        exponent = _topmost(exponent, (sizes - 1).bit_length(), choices=sizes)
        (components,) = self._products([(u, power)])
        most = 1 << self.step_bits
        # Of 2**LOW u 2**-e: those of a component.
        components.frac_bits = self.digits + LOW - self.step_bits
        components.bound = 2 * most << components.frac_bits
        rounded = self._rounded(components, most)
        rounded = _topmost(rounded, self.step_bits + 2, choices=2 * most + 1)
        opened, size = self.session.open_all(
            [(rounded, "step", (MOVING,)), (exponent, "step_size", (MOVING,))]
        )
        if opened is None:
            return None, None
        return int(size[0]) % sizes + least, opened.astype(int)

    def _size_of(self, u):
        """The exponent e, less the least, and ``2**(LOW - e)``."""
        least, largest = self.exponents
        # The square is below 2**(k + 1).
        each = [-(-(k + 1 - self.square_digits) // 2) for k in range(SIZE_BITS)]
        each = [max(e, least) for e in each]
        return self._by_size(
            u,
            [min(e, largest) - least for e in each],
            [1 << max(LOW - e, 0) for e in each],
        )

    def _rounded(self, x, largest):
        """Integers nearest to numbers, at most `largest`, in words of 32 bits."""
        s = self.session
        x = self._dropped(x, x.frac_bits - ROUNDED_DIGITS)
        x = self._plus(x, 1 << ROUNDED_DIGITS - 1)
        # Integers below twice the largest, and their sign.
        places = largest.bit_length() + 1
        bits = circuits.bits_of(s, x.share, R128, ROUNDED_DIGITS + places)
        values = np.arange(1 << places)
        values -= (values >> places - 1) << places
        values = np.clip(values, -largest, largest) % (1 << places)
        bits = circuits.table(s, bits[ROUNDED_DIGITS:], values)
        weights = [*(1 << b for b in range(places - 1)), -1 << places - 1]
        share = circuits.weighted(s, bits, weights, R32, len(x.share))
        return SharedArray(R32, share, 2, 0, largest)

    def show_matrix(self, matrix, *, label, digits, bits, most):
        """Show the moving owner a matrix; see `SecretNumbers.show_matrix`."""
        self._risk(matrix)
        part = shifted(self.session, matrix.share, matrix.frac_bits - digits, R64)
        shown = SharedArray(R64, part, 2, digits, int(most) << digits)
        shown = _topmost(shown, round(math.log2(most)) + 1)
        shown.noise_bits = math.log2(2**R64.bits - 1) - bits
        return self.session.open(shown, label, (MOVING,))

    def show_value(self, value, unit):
        """Show the moving owner a number to 3 digits, of magnitude below 8.

        Parameters
        ----------
        value : SharedArray, shape (1,)
            in units of `unit`, the reciprocal of a power of two.
        """
        digits = value.frac_bits - round(math.log2(unit))
        share = R128.scale(value.share, VALUE_PLACES)
        thousands = SharedArray(R128, share, 2, digits, LARGEST_VALUE << digits)
        array = _topmost(thousands, VALUE_BITS)
        # Digits of noise, as good as rounded.
        array = blur(self.session, array, array.frac_bits, by=STATIC)
        opened = self.session.open(array, "final_value", (MOVING,))
        return None if opened is None else float(np.rint(opened[0])) / VALUE_PLACES


def _topmost(x, places, choices=None):
    """Numbers of few bits before the point, above which their ring has no room.

    Parameters
    ----------
    x : SharedArray
    places : int
        bits before the point, with the sign.
    choices : int, optional
        see `SharedArray`.
    """
    ring = x.field
    share = ring.scale(x.share, 1 << ring.bits - places - x.frac_bits)
    bound = (1 << ring.bits - 1) - 1
    return SharedArray(ring, share, 2, ring.bits - places, bound, 0, choices)


def _flat(array):
    return R128.flat(array.share)


def _parted(whole, likes):
    """A vector as arrays of the shapes of others."""
    parts, start = [], 0
    for like in likes:
        stop = start + math.prod(like.shape)
        parts.append(whole[start:stop].reshape(like.shape))
        start = stop
    return parts


def _summed(share):
    """Sums of elements along the last axis."""
    total = share[..., 0, :]
    for k in range(1, share.shape[-2]):
        total = R128.add(*map(np.ascontiguousarray, (total, share[..., k, :])))
    return np.ascontiguousarray(total)


def _weighted(words):
    """Numbers by their bits, lowest first."""
    total = R128.zeros(words.shape[1:-1])
    for b, word in enumerate(words):
        total = R128.add(total, R128.scale(word, 1 << b))
    return total


def _transformed(matrix, part):
    """A public matrix times a vector, which gets `DIRECTION_DIGITS`."""
    known = R128.encode(matrix, DIRECTION_DIGITS, LARGEST_DIRECTION)
    whole = np.ascontiguousarray(np.broadcast_to(part, known.shape))
    return _summed(R128.mul(known, whole))
