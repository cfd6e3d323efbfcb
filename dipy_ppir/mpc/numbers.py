r"""Fixed-point numbers on shares, for an optimizer of few numbers.

The numbers live in GF(2^127 - 1), where shares are MPyC's: MPyC compares them
(`mpyc_bridge`), products are of packed arrays on the same shares, and this package's
own protocols drop digits (`protocols.truncate`) and divide (`reciprocal`).

The verbs are those of `dipy_ppir.align.quasinewton.ClearNumbers`, which is what they do
in the clear. Rounds, and bytes on all links for n results:

===========  ==========================  ==========================================
verb         rounds                      bytes
===========  ==========================  ==========================================
`own`        1                           16 n
`dots`       2                           48 n
`times`      2                           48 n
`outer`      2                           48 n
`gates`      1                           48 n
`inverses`   8                           16 + 1687 + 1856 + 32 + 144 + 64 + 48 each
`less`       3, and MPyC's and 1         16 + 64 + 32 for each pair, and MPyC's
`show_step`  8                           16 + 1687 + 2048 + 32 + 128 + 32 and 16 + 4 +
                                         2048 for each component, and what is opened
`limited`    10                          16 + 1687 + 1024 + 32 + 128 + 32 and 256
                                         for each component, 48 for each of a motion
`moved`      4                           96 n
`mean`       2                           48 n
`show`       1                           16 n, and what is opened, to show a matrix
===========  ==========================  ==========================================

What each party sees before an opening is uniform: points of fresh lines, masked words
and what is dealt. The moving owner is opened a step and a bit, and may not choose how
they come about: all that it gives is shared before.

Magnitudes are promised, not checked: a result that is larger than `MAGNITUDE`, or the
bound that the caller gives, is a wrong number, and nothing worse: whatever is sent is
hidden by masks of the size of its ring or field, but for MPyC's comparisons, which are
given nothing that is larger than they expect.
"""

from itertools import zip_longest
import math

import numpy as np

from dipy_ppir.mpc import mpyc_bridge, reciprocal, smooth
from dipy_ppir.mpc import normalize as normal
from dipy_ppir.mpc.arrays import SharedArray, broadcast
from dipy_ppir.mpc.fields import P127, R32, R64, R128
from dipy_ppir.mpc.ledger import HELPER, MOVING, declare
from dipy_ppir.mpc.protocols import (
    confined,
    deal,
    pad,
    reduce,
    share,
    share_owners,
    swap,
    truncate,
    truncate_between_owners,
    with_dealt,
)

declare(
    "step",
    receivers=(MOVING,),
    shape="number of parameters of the transform, each step",
    meaning="the direction of the next step, to a few bits of its size",
    bits=math.log2(17),
)
declare(
    "step_size",
    receivers=(MOVING,),
    shape="1 each step",
    meaning="the size of the next step, as one of 16 powers of two",
    bits=4,
)
declare(
    "better",
    receivers=(MOVING,),
    shape="1 each step",
    meaning="whether the last step made the match better",
    bits=1,
)

#: The value that is shown is a multiple of the reciprocal of this, and its bits.
VALUE_PLACES, LARGEST_VALUE, VALUE_BITS = 1000, 8191, 14

declare(
    "final_value",
    receivers=(MOVING,),
    shape="1, once, if it is asked for",
    meaning="how well the two images match in the end, to 3 digits",
    bits=VALUE_BITS,
)

#: No result is larger than this.
MAGNITUDE = 1 << 30
#: No number that the moving owner gives is.
OWN_MAGNITUDE = 1 << 13
#: Differences of fewer bits are compared rightly.
COMPARABLE_BITS = 50
#: Steps are brought into a range: a component that has no more bits than this, its
#: fraction included, stays what it is, and a square has no more than this.
ASCENT_BITS, SQUARE_BITS = 37, 86
#: Fraction bits of components to be rounded.
ROUNDED_DIGITS = 4
#: Components are multiplied by 2**(LOW - e), which is an integer.
LOW = 15
#: Fraction bits of the part of a step that is taken, and of what a step does; nothing
#: that comes of one is larger.
PART_DIGITS, DIRECTION_DIGITS = 36, 20
LARGEST_DIRECTION, LARGEST_MOTION = 1 << 8, 8
#: Fraction bits of the reciprocal of x, see `reciprocal`.
_FRACTION_DIGITS = 22


class SharedNumbers:
    """What is the same however numbers are shared; see `SecretNumbers`.

    Parameters
    ----------
    session : Session
    digits : int
        fraction bits that are kept.
    floor : float
        added to what is divided by.
    step_bits : int
        bits of an opened component of a step, without sign.
    exponents : tuple of int
        least and largest exponent of a step's size that is opened.
    square_digits : int
        fraction bits of the square of a step's size.
    tilt_bits : int
        binary places between a step and what it is tilted by.
    """

    def __init__(
        self, session, *, digits, floor, step_bits, exponents, square_digits, tilt_bits
    ):
        self.session = session
        self.digits, self.floor = digits, floor
        self.step_bits, self.exponents = step_bits, exponents
        self.square_digits, self.tilt_bits = square_digits, tilt_bits

    def complement(self, x):
        """1 - x."""
        return self.raised(-x)

    def moved(self, matrix, motion):
        """A matrix and a small motion before it; see `ClearNumbers.moved`."""
        dim = matrix.shape[0]
        first = self._product(matrix[:, :dim], motion, 0)
        total = matrix + first + self._product(first[:, :dim], motion, 1)
        return total._with(total.share, bound=OWN_MAGNITUDE << self.digits)

    def mean(self, arrays):
        """Of a power of two of them."""
        total = arrays[0]
        for array in arrays[1:]:
            total = total + array
        flat = total.reshape(-1)
        flat.frac_bits += len(arrays).bit_length() - 1
        (mean,) = self._truncated([flat], ())
        mean.bound = OWN_MAGNITUDE << self.digits
        return mean.reshape(total.shape)

    def show_better(self, bit):
        """Show the moving owner a bit."""
        return self.show_bit(bit, "better", (MOVING,))

    def show_bit(self, bit, label, receivers):
        """Show a bit; None where it is not shown. Rounds: 1."""
        bit = bit._with(bit.share, choices=2)
        opened = self.session.open(bit, label, receivers)
        return None if opened is None else bool(round(opened[0]))

    def either(self, a, b):
        """Whether one of two bits is set. Rounds: 1."""
        return a + b - self.gates((a, b))[0]


class SecretNumbers(SharedNumbers):
    """Numbers on shares; see `ClearNumbers` of ``dipy_ppir.align.quasinewton``.

    Parameters
    ----------
    session : Session
    **options
        see `SharedNumbers`.
    """

    def own(self, x, shape, digits=None, bound=OWN_MAGNITUDE, owner=MOVING):
        """Numbers that an owner knows."""
        return share(
            self.session,
            owner,
            x,
            shape,
            frac_bits=self.digits if digits is None else digits,
            bound=bound,
            field=P127,
            name="own",
        )

    def public(self, x):
        """Numbers that all know."""
        return SharedArray(
            P127,
            P127.encode(x, self.digits, OWN_MAGNITUDE),
            1,
            self.digits,
            OWN_MAGNITUDE << self.digits,
        )

    # -- products ----------------------------------------------------------

    def dots(self, *pairs, digits=()):
        """Matrix and inner products; digits each has if not those of all."""
        products = []
        for a, b in pairs:
            left = a if len(a.shape) == 2 else a.reshape(1, -1)
            product = left @ b.reshape(-1, 1)
            products.append(_promised(product.reshape(-1), MAGNITUDE))
        return self._truncated(products, digits)

    def times(self, *pairs, bounds=()):
        """Elementwise products, and a bound on each if not that of all."""
        products = []
        for (a, b), bound in zip_longest(pairs, bounds, fillvalue=MAGNITUDE):
            shape = np.broadcast_shapes(a.shape, b.shape)
            product = broadcast(a, shape) * broadcast(b, shape)
            products.append(_promised(product, bound))
        return self._truncated(products, ())

    def _truncated(self, products, digits):
        """All with the digits that they shall have; rounds: 2."""
        given = zip_longest(products, digits, fillvalue=self.digits)
        drops = [a.frac_bits - d for a, d in given]
        most = max(drops)
        raised = [a.times(1 << most - d) for a, d in zip(products, drops, strict=True)]
        whole = truncate(self.session, _joined(raised), most)
        parts = _parted(whole, [a.shape for a in products])
        return [
            SharedArray(P127, part.share, 1, a.frac_bits - d, (a.bound >> d) + 1)
            for part, a, d in zip(parts, products, drops, strict=True)
        ]

    def outer(self, a, b):
        """Half of the outer products, ``(a b' + b a') / 2``."""
        n = len(a.share)
        column = broadcast(a.reshape(n, 1), (n, n))
        product = column * broadcast(b.reshape(1, n), (n, n))
        # Half of it: a binary place more to drop.
        product = _promised(product, OWN_MAGNITUDE)
        whole = truncate(self.session, product, product.frac_bits + 1 - self.digits)
        half = SharedArray(P127, whole.share, 1, self.digits, whole.bound)
        return half + half._with(np.ascontiguousarray(half.share.swapaxes(0, 1)))

    def gates(self, *pairs):
        """Products with bits, exact."""
        products = [broadcast(bit, x.shape) * x for bit, x in pairs]
        whole = reduce(self.session, _joined(products))
        parts = _parted(whole, [a.shape for a in products])
        # What is added up step by step is not larger for it.
        return [
            SharedArray(
                P127, part.share, 1, x.frac_bits, min(x.bound, MAGNITUDE << x.frac_bits)
            )
            for part, (_, x) in zip(parts, pairs, strict=True)
        ]

    def raised(self, x):
        """1 + x."""
        return x.add_public(1 << x.frac_bits)

    # -- what is not linear ------------------------------------------------

    def less(self, *pairs):
        """For each pair whether the first is less: a bit on shares."""
        differences = [(a - b).reshape(-1) for a, b in pairs]
        # MPyC hides what it compares by numbers that are 42 bits longer than it is
        # promised to be.
        whole = _in_range(self.session, _joined(differences))

        def below_zero(mpc, x):
            return (x < 0,)

        (bits,) = mpyc_bridge.evaluate(
            self.session, below_zero, (whole,), (1,), kind="integer"
        )
        return _parted(bits, [a.shape for a in differences])

    def inverses(self, *numbers, digits=None):
        """Reciprocals of positive numbers of the same digits."""
        s, digits = self.session, self.digits if digits is None else digits
        numbers = [a.reshape(-1) for a in numbers]
        given = numbers[0].frac_bits
        v = _joined(numbers).add_public(int(self.floor * 2**given) + 1)
        v.bound = (1 << normal.number_bits(R64)) - 1
        n = len(v.share)
        fraction = pad(s, "fraction", (n,))

        def deal_all():
            masks = normal.deal_masks(s, n)
            return masks, reciprocal.deal_masks(s, fraction, masks.position, R64)

        def begin():
            part = truncate_between_owners(s, v, 0, field=R64, name="divisor")
            return normal.open_masked(s, SharedArray(R64, part, 2, 0, v.bound))

        receive, (masks, dealt) = with_dealt(s, deal_all, begin)
        opened = smooth.open_normalized(s, receive(), masks, fraction)
        inverse = reciprocal.reciprocal(s, opened, dealt, n, R64)
        fraction = share_owners(
            s, inverse.fraction, smooth.FINE_BITS - _FRACTION_DIGITS, P127
        )
        power = share_owners(s, inverse.power, 0, P127, "power")
        product = fraction * power
        drop = _FRACTION_DIGITS + R64.bits - 2 - given - digits
        whole = truncate(s, product, drop)
        bound = int(2**digits / self.floor)
        whole = SharedArray(P127, whole.share, 1, digits, bound)
        return _parted(whole, [a.shape for a in numbers])

    # -- steps that are not shown ------------------------------------------

    def limited(self, ascent, parts, directions):
        """A part of the quasi-Newton step, by its size; see `ClearNumbers.limited`."""
        ascent = _in_range(self.session, ascent, ASCENT_BITS)
        unit = 1 << PART_DIGITS
        (c,) = self._by_size(ascent, [round(x * unit) for x in parts])
        c = self._in_field(c, unit, "part")
        c.frac_bits = PART_DIGITS
        p = len(ascent.share)
        flat = directions.reshape(p, -1).T
        known = P127.encode(flat, DIRECTION_DIGITS, LARGEST_DIRECTION)
        motion = P127.matmul(known, (-ascent).reshape(-1, 1).share)[:, 0]
        motion = SharedArray(
            P127, motion, 1, ascent.frac_bits + DIRECTION_DIGITS, ascent.bound
        )
        vector = broadcast(c, (p,)) * -ascent
        tilt = vector.times(1)
        tilt.frac_bits += self.tilt_bits
        back = vector.times(round(-parts[0] * (1 << DIRECTION_DIGITS)))
        back.frac_bits += DIRECTION_DIGITS
        motion = broadcast(c, motion.shape) * motion
        for product in (vector, tilt, back, motion):
            product.bound = LARGEST_MOTION << product.frac_bits
        vector, tilt, back, motion = self._truncated([vector, tilt, back, motion], ())
        part = self.public(parts[:1])
        return vector, tilt, part, back, motion.reshape(directions.shape[1:])

    def _product(self, a, b, halved):
        """Matrix product, divided by ``2**halved``."""
        shape = a.shape[0], b.shape[1]
        product = _promised((a @ b).reshape(-1), OWN_MAGNITUDE)
        product.frac_bits += halved
        return self._truncated([product], ())[0].reshape(shape)

    def product(self, matrix, right):
        """A matrix and another one before it, exact; to be shown.

        Rounds: 0, which leaves a product that is reduced only where it is shown.

        Parameters
        ----------
        matrix, right : SharedArray, shape (dim, dim + 1)
            of both the last row is left out, which is that of the identity.
        """
        product = matrix[:, :-1] @ right
        shift = matrix.times(1 << right.frac_bits).share.copy()
        shift[:, :-1] = 0
        product = product._with(P127.add(product.share, shift))
        return _promised(product, OWN_MAGNITUDE)

    # -- what is opened ----------------------------------------------------

    def show_step(self, u):
        """Show the moving owner a step's exponent and its rounded components.

        Returns
        -------
        exponent : int
        mantissas : array of int, shape (p,)
            both None elsewhere.
        """
        s, p = self.session, len(u.share)
        exponent, power = self._size_of(u)
        components = u * broadcast(power, (p,))
        largest = 1 << self.step_bits
        # Of 2**LOW u 2**-e: those of a component, and its fraction's.
        drop = self.digits + LOW - self.step_bits - ROUNDED_DIGITS
        components.bound = 2 * largest << self.digits + LOW - self.step_bits
        parts = truncate_between_owners(s, components, drop, field=R32, name="step")
        size = 4 * largest << ROUNDED_DIGITS
        rounded = self._rounded(parts, largest, size, ROUNDED_DIGITS)
        opened, size = s.open_all(
            [
                (SharedArray(R32, rounded, 2, 0, largest), "step", (MOVING,)),
                (exponent, "step_size", (MOVING,)),
            ]
        )
        if opened is None:
            return None, None
        return int(size[0]), opened.astype(int)

    def show_matrix(self, matrix, *, label, digits, bits, most):
        """Show the moving owner a matrix.

        Parameters
        ----------
        matrix : SharedArray
        label : str
            of the opening.
        digits : int
            fraction bits that are shown.
        bits : float
            of each number that say something: the others are noise.
        most : float
            largest magnitude that is shown; what is larger shows as another number.

        Returns
        -------
        matrix : array, or None
            at the moving owner.
        """
        drop = matrix.frac_bits - digits
        part = truncate_between_owners(
            self.session, matrix, drop, field=R64, name="shown"
        )
        # Nothing above what may be shown is sent.
        places = round(math.log2(most)) + digits + 1
        part = R64.scale(part, 1 << R64.bits - places)
        shown = SharedArray(
            R64,
            part,
            2,
            digits + R64.bits - places,
            (1 << R64.bits - 1) - 1,
            noise_bits=math.log2(2**R64.bits - 1) - bits,
        )
        return self.session.open(shown, label, (MOVING,))

    def show_value(self, value, unit):
        """Show the moving owner a number to 3 digits, of magnitude below 8.

        Parameters
        ----------
        value : SharedArray, shape (1,)
            in units of `unit`, the reciprocal of a power of two.
        """
        # Thousands of it.
        drop = value.frac_bits - round(math.log2(unit))
        thousands = value.times(VALUE_PLACES)
        thousands.bound = LARGEST_VALUE << drop
        part = truncate_between_owners(
            self.session, thousands, drop, field=R32, name="value"
        )
        part = self._rounded(part, LARGEST_VALUE, 1 << 15, 0)
        array = SharedArray(R32, part, 2, 0, LARGEST_VALUE)
        opened = self.session.open(array, "final_value", (MOVING,))
        return None if opened is None else float(opened[0]) / VALUE_PLACES

    def _size_of(self, u):
        """The exponent e, on shares of the owners, and ``2**(LOW - e)``."""
        least, largest = self.exponents
        # The square is below 2**(k + 1), see `normalize`.
        each = [-(-(k + 1 - self.square_digits) // 2) for k in range(R64.bits)]
        each = [max(e, least) for e in each]
        shown = [min(e, largest) for e in each]
        powers = [1 << max(LOW - e, 0) for e in each]
        exponent, power = self._by_size(u, shown, powers)
        choices = largest - least + 1
        exponent = SharedArray(R128, exponent, 2, 0, 1 << 5, choices=choices)
        return exponent, self._in_field(power, 1 << LOW - least, "power")

    def _in_field(self, part, bound, name):
        array = SharedArray(R128, part, 2, 0, bound)
        return share_owners(self.session, array, 0, P127, name)

    def _by_size(self, u, *functions):
        """Functions of the highest bit of ``u @ u``, with `square_digits`.

        Rounds: 6.

        Parameters
        ----------
        u : SharedArray, shape (p,)
        *functions : list of int
            values for every bit of a word of 64.

        Returns
        -------
        parts : list of array
            an owner's parts, in the ring of 128 bits.
        """
        s = self.session
        square = u.reshape(1, -1) @ u.reshape(-1, 1)
        square = square.reshape(1)
        square.bound = (1 << SQUARE_BITS) - 1
        drop = square.frac_bits - self.square_digits

        def deal_all():
            masks = normal.deal_masks(s, 1)
            return masks, [
                normal.deal_function(s, masks.position, R64, values)
                for values in functions
            ]

        def begin():
            part = truncate_between_owners(s, square, drop, field=R64, name="square")
            if s.pid == MOVING:
                part = part + np.uint64(1)
            v = SharedArray(R64, part, 2, 0, (1 << normal.number_bits(R64)) - 1)
            return normal.open_masked(s, v)

        receive, (masks, dealt) = with_dealt(s, deal_all, begin)
        masked = receive()
        if s.pid == HELPER:
            return [R128.zeros((1,)) for _ in functions]
        position = normal.position_of(s, masked, masks)
        return [normal.look_up(position, f) for f in dealt]

    def _rounded(self, parts, largest, size, digits):
        """Round components to integers by a table; the owners hold words of 32 bits.

        Rounds: 1. A component with `digits` more is opened to the owners behind a mask,
        modulo `size`, a power of two that is more than twice its range, and looked up
        in a dealt table, in which nothing is larger than `largest`.
        """
        s, unit = self.session, 1 << digits
        mask = pad(s, "rounding", parts.shape, np.uint16)
        table = None
        if s.pid == HELPER:
            c = np.arange(size)[:, None] - mask.astype(int)[None]
            c = (c + size // 2) % size - size // 2
            table = np.clip((c + unit // 2) // unit, -largest, largest)
            table = R32.encode_int(table)
        shape = (size, *parts.shape)
        table = deal(s, "roundings", table, shape, np.uint32)
        if s.pid == HELPER:
            return R32.zeros(parts.shape)
        opened = parts.astype(np.uint16) + mask & np.uint16(size - 1)
        opened = opened + swap(s, "rounding", opened)() & np.uint16(size - 1)
        return table[opened, np.arange(len(opened))]


def _in_range(session, array, bits=COMPARABLE_BITS):
    """The same numbers where they are below ``2**bits``; else others, as small.

    Rounds: 3; see `protocols.confined`.
    """
    array = array._with(array.share, bound=(1 << bits) - 1)
    part = truncate_between_owners(session, array, 0, field=R64, name="ranged")
    part = SharedArray(R64, part, 2, array.frac_bits, array.bound)
    return confined(session, part, bits, P127, "ranged")


def _promised(product, bound):
    """A product of which more is known than the bounds of its factors say."""
    product.bound = int(bound) << product.frac_bits
    return product


def _joined(arrays):
    """Elements of arrays of one field as one vector, with the first one's scale."""
    share = np.concatenate([a.field.flat(a.share) for a in arrays])
    bound, degree = max(a.bound for a in arrays), max(a.degree for a in arrays)
    return SharedArray(arrays[0].field, share, degree, arrays[0].frac_bits, bound)


def _parted(whole, shapes):
    """Inverse of `_joined`."""
    parts, start = [], 0
    for shape in shapes:
        n = int(np.prod(shape))
        parts.append(whole[start : start + n].reshape(shape))
        start += n
    return parts
