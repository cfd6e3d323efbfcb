r"""A small language for protocols: masked values, and sums of products of them.

A protocol is written once, as formulas, and runs in two worlds: on the shares of three
parties (`Shares`), and in the clear (`Clear`), where the same formulas and roundings
are done with real numbers. Its words are

- `own`: numbers that one owner knows; nothing is sent;
- `given`: the same, masked, of which the other part of the mask is zero;
- `Masked`: numbers x of which both owners know x - a, with a mask a whose two parts the
  owners hold, and the helper knows both. They may be multiplied;
- sums of products of masked numbers, with public linear maps before and after
  (`Expression`); nothing is computed when they are written down;
- `fresh`: sums of products, with the digits dropped that are not needed, masked again.

**Products.** Let the moving owner hold the parts a', b' of the masks and the static
owner a'', b''. Of x = X + a' + a'' the *factors* X + 2 a' and X + 2 a'' are x plus and
less a' - a'', so that with the same of y

.. math::

    2 x y = (X + 2 a') (Y + 2 b') + (X + 2 a'') (Y + 2 b'') - 2 (a' - a'') (b' - b'').

Each party computes one of the three products. Of the last, the *correction*, the helper
sends the static owner what is left when a part is taken off that the moving owner draws
too. All this is bilinear: a linear map of a sum of products costs what its outputs
cost, not its terms.

**Rounding.** Each owner shifts its part (`protocols.truncate_part`): the result is
rounded up or down by chance, and wrong with a probability of its magnitude over the
ring's size, see `Shares.failures`.

===========  ======  =========================================================
verb         rounds  elements of 16 bytes, on all links
===========  ======  =========================================================
`own`        0       0
`masked`     1       2 per number
`given`      1       1 per number
`fresh`      1       3 per number: 1 from the helper, 2 between the owners
`secret`     0       1 per number, from the helper
===========  ======  =========================================================

What each party sees: the helper nothing. An owner sees the other's part, or what is
given, less a part of a mask that the other and the helper draw, and corrections less
numbers that the moving owner and the helper draw. No mask serves twice, so that all of
this is uniform and independent of the secrets: a simulator draws it at random.
"""

from dataclasses import dataclass, field
from functools import cached_property
import math
from typing import NamedTuple

import numpy as np

from dipy_ppir.mpc import protocols, steps
from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.errors import FixedPointOverflowError, RoundingError
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC, declare
from dipy_ppir.mpc.scratch import scratch

#: Elements that are sent at a time, 32 MB; no more than twice as many are under way.
PIECE = 1 << 21


def _pieces(x):
    """A flat array of elements in pieces."""
    return [x[start : start + PIECE] for start in range(0, len(x), PIECE)]


def add_into(total, x):
    """Add packed elements to others, in their place."""
    R128.kernels.add(R128.flat(total), R128.flat(x), R128.flat(total))


class Digits(NamedTuple):
    """How a number is kept.

    Attributes
    ----------
    unit : float
        numbers are multiples of it, or of one near it; 0 to drop no digits.
    bound : float
        promised to be larger than any of them.
    """

    unit: float
    bound: float


declare(
    "whole",
    receivers=(MOVING, STATIC, HELPER),
    shape="1 at the end of each level",
    meaning="whether no number of the computation left its range",
    bits=1,
)


@dataclass
class Masked:
    """Numbers that may be multiplied; see the module.

    Attributes
    ----------
    factor : array
        at the owners what they know of the number and twice their part of its mask, at
        the helper the difference of the two parts; in the clear the number itself.
    part : array or None
        this owner's part of the number.
    unit : float
    shape : tuple of int
    """

    factor: np.ndarray
    part: np.ndarray
    unit: float
    shape: tuple

    def __mul__(self, other):
        return product(PRODUCT, (self,), (other,))


class Mapped(Masked):
    """A public linear map of masked numbers, of which only what is used is computed."""

    def __init__(self, linear, x):
        self.linear, self.x = linear, x
        self.unit, self.shape = x.unit * linear.unit, linear.shape(x.shape)

    @cached_property
    def factor(self):
        """See `Masked`."""
        return self.linear.ring(self.x.factor)

    @cached_property
    def part(self):
        """See `Masked`."""
        return None if self.x.part is None else self.linear.ring(self.x.part)


class Difference(Masked):
    """Masked numbers less others, of which only what is used is computed."""

    def __init__(self, x, y):
        self.x, self.y = x, y
        self.unit, self.shape = x.unit, x.shape

    @cached_property
    def factor(self):
        """See `Masked`."""
        return R128.sub(self.x.factor, self.y.factor)

    @cached_property
    def part(self):
        """See `Masked`."""
        return None if self.x.part is None else R128.sub(self.x.part, self.y.part)


@dataclass
class Secret:
    """Numbers that the owners hold parts of; in the clear the numbers.

    Attributes
    ----------
    part : array or None
    unit : float
    shape : tuple of int
    """

    part: np.ndarray
    unit: float
    shape: tuple


class Product:
    """Elementwise product of two masked arrays: the plainest form.

    A form is a bilinear map of some masked arrays on its left and some on its right.
    Whatever defines these five methods is one.

    Attributes
    ----------
    symmetric : bool
        whether left and right may change places.
    """

    symmetric = True

    def result(self, left, right):
        """Unit and shape of what comes of masked numbers."""
        (x,), (y,) = left, right
        return x.unit * y.unit, np.broadcast_shapes(x.shape, y.shape)

    def clear(self, left, right):
        """Of real numbers."""
        return left[0] * right[0]

    def ring(self, left, right, out, factor):
        """Add that of packed arrays, times an integer, to `out`."""
        x, y = (np.broadcast_to(k, out.shape) for k in (*left, *right))
        R128.addmul(out, *map(np.ascontiguousarray, (x, y)), factor)

    def factors(self, side, arrays, shape):
        """What is multiplied number by number, of one side: linear in its arrays.

        Two owners compute a form of what only one knows of the left and only the other
        of the right by its elementary products. `ring` is what `collect` makes of the
        products of both sides' factors.

        Parameters
        ----------
        side : {0, 1}
            left or right.
        arrays : list of array
            packed, of that side.
        shape : tuple of int
            of the result.

        Yields
        ------
        kind : int
            products of one kind, which are of one shape, may be added up before they
            are collected.
        factor : array
            packed; as many, of the same kinds and shapes, on either side.
        """
        yield 0, np.broadcast_to(arrays[0], (*shape, 2))

    def collect(self, kind, products, out):
        """Add what comes of products of a kind to `out`."""
        add_into(out, products)


PRODUCT = Product()


class Total(Product):
    """Sum of the elementwise products."""

    def result(self, left, right):
        """Unit and shape of what comes of masked numbers."""
        return super().result(left, right)[0], (1,)

    def clear(self, left, right):
        """Of real numbers."""
        return np.array([np.vdot(left[0], right[0])])

    def ring(self, left, right, out, factor):
        """Add that of packed arrays, times an integer, to `out`."""
        add_into(out, R128.scale(R128.dot(*left, *right), factor))

    def factors(self, side, arrays, shape):
        """See `Product`."""
        yield 0, arrays[0]

    def collect(self, kind, products, out):
        """See `Product`."""
        add_into(out, summed(products))


def summed(x):
    """Sum of packed elements: one element."""
    x = R128.flat(x)
    return R128.dot(x, R128.encode_int(np.ones(len(x))))


@dataclass
class Expression:
    """A sum of products and of masked or secret numbers, not yet computed.

    Attributes
    ----------
    products : list of (form, left, right, factor)
    terms : list of (array, factor)
    unit : float
    shape : tuple of int
    """

    unit: float
    shape: tuple
    products: list = field(default_factory=list)
    terms: list = field(default_factory=list)

    def __add__(self, other):
        other = expression(other)
        if self.shape != other.shape or not math.isclose(self.unit, other.unit):
            raise ValueError(
                f"cannot add numbers of units {self.unit} and {other.unit}, of shapes "
                f"{self.shape} and {other.shape}"
            )
        return Expression(
            self.unit,
            self.shape,
            self.products + other.products,
            self.terms + other.terms,
        )

    def __neg__(self):
        return self.times(-1)

    def __sub__(self, other):
        return self + -expression(other)

    def times(self, factor):
        """A public integer times it."""
        return Expression(
            self.unit,
            self.shape,
            [(*p, c * factor) for *p, c in self.products],
            [(x, c * factor) for x, c in self.terms],
        )

    def weighted(self, coefficient, unit):
        """A public number times it, in a unit that is much smaller than its own."""
        factor = round(coefficient * self.unit / unit)
        if not factor and coefficient:
            raise ValueError(f"{coefficient} times {self.unit} is nothing in {unit}")
        return self.times(factor).over(self.unit / unit)

    def over(self, divisor):
        """Divided by a public number: another unit."""
        return Expression(self.unit / divisor, self.shape, self.products, self.terms)


def expression(x):
    """Masked or secret numbers as an `Expression`."""
    return x if isinstance(x, Expression) else Expression(x.unit, x.shape, [], [(x, 1)])


def product(form, left, right):
    """An `Expression` of one product."""
    unit, shape = form.result(left, right)
    return Expression(unit, tuple(shape), [(form, tuple(left), tuple(right), 1)])


def dropped(x, digits, plus=()):
    """How many low bits of an expression are dropped, and the unit that is left.

    On shares products come twice as large. The unit is within a factor of sqrt(2) of
    the one wanted.
    """
    whole = x.unit / 2 if x.products else x.unit
    bits = round(math.log2(digits.unit / whole)) if digits.unit else 0
    unit = whole * 2.0**bits
    if bits < 0 or not all(math.isclose(unit, m.unit) for m in plus):
        raise ValueError(f"numbers of unit {x.unit} cannot get the unit {digits.unit}")
    # Else what the last digits of units lose would grow from product to product.
    return bits, digits.unit if math.isclose(unit, digits.unit) else unit


class Opening(NamedTuple):
    """Numbers about to be opened.

    Attributes
    ----------
    numbers : sequence of Expression, Masked or Secret
        of one unit and shape.
    precision : float
    bound : float
        promised to be larger than any of them.
    label : str
    receivers : sequence of int
    """

    numbers: tuple
    precision: float
    bound: float
    label: str
    receivers: tuple

    @property
    def size(self):
        """How many numbers there are."""
        return sum(math.prod(x.shape) for x in self.numbers)

    @property
    def noise_bits(self):
        """Of how many bits of the ring the noise is; all others may be seen."""
        return 126 - math.ceil(self.bound / self.precision).bit_length()

    @property
    def bits(self):
        """How many bits of each number are counted."""
        return 128 - self.noise_bits


#: Between these powers of two `rates` tells numbers apart.
RATE_STEPS = range(8, steps.BITS - 2)


def step_heights(unit, longest, power, digit):
    """What `rates` makes of numbers from 2**k units to twice that, in digits."""
    middles = unit * 2.0 ** (np.array(RATE_STEPS) + 0.5)
    return [round(h) for h in longest / middles ** (1 / power) / digit]


def _compared_bits(digits, unit):
    """Bits of numbers that are compared with thresholds as large as they are."""
    return (2 * int(digits.bound / unit)).bit_length() + 2


class Clear:
    """Protocols in the clear: the same formulas and roundings on real numbers."""

    def own(self, values, owner, shape, digits):
        """Numbers of an owner."""
        return self._kept(np.asarray(values, dtype=np.float64), digits.unit)

    def map(self, linear, x):
        """A public linear map of masked numbers."""
        y = linear.clear(x.factor)
        return Masked(y, None, x.unit * linear.unit, y.shape)

    def masked(self, *numbers):
        """Numbers ready to be multiplied."""
        return [Masked(x.part, None, x.unit, x.shape) for x in numbers]

    def given(self, owner, *numbers):
        """Numbers of an owner ready to be multiplied."""
        return self.masked(*numbers)

    def fresh(self, *wanted):
        """Expressions with the digits wanted, ready to be multiplied."""
        return self.masked(*(self.secret(*w) for w in wanted))

    def secret(self, x, digits, plus=()):
        """An expression with the digits wanted; those of `plus` are added."""
        x = expression(x)
        x = self._kept(self._value(x), dropped(x, digits, plus)[1])
        for masked in plus:
            x.part += masked.factor
        return x

    def rates(self, norms, longest, power, digits):
        """See `Shares.rates`."""
        heights = step_heights(norms[0].unit, longest, power, digits.unit)
        out, most = [], Digits(0.0, norms[0].unit * 2.0 ** (steps.BITS - 2))
        self.check(*((x, most) for x in self.masked(*norms)))
        for x in norms:
            k = np.searchsorted(2.0 ** np.array(RATE_STEPS), x.part / x.unit, "right")
            height = heights[max(int(k[0]) - 1, 0)] * digits.unit
            out.append(Secret(np.array([height]), digits.unit, (1,)))
        return self.masked(*out)

    def stepped(self, x, thresholds, values, digits, unit):
        """See `Shares.stepped`."""
        x = self._value(expression(x))
        at = np.searchsorted(thresholds, x, "right")
        return self._kept(np.asarray(values)[at], unit)

    def reached(self, groups, digits):
        """See `Shares.reached`."""
        return [
            sum(
                int(self.secret(x, digits).part[0] >= threshold)
                for x, threshold in numbers
            )
            for numbers, _, _ in groups
        ]

    def section(self, name):
        """See `Shares.section`."""

    def renewed(self, *numbers):
        """See `Shares.renewed`."""
        return list(numbers)

    def settled(self, x, digits):
        """See `Shares.settled`."""
        return x

    def minus(self, x, y):
        """Masked numbers less others."""
        return Masked(x.factor - y.factor, None, x.unit, x.shape)

    def plus(self, x, constant):
        """Masked numbers and a public one."""
        return Masked(x.factor + constant, None, x.unit, x.shape)

    def shown(self, *wanted):
        """Numbers to their precision; see `Shares.shown`."""
        out = []
        for w in wanted:
            x = np.stack([self._value(expression(x)) for x in w.numbers])
            self.check((Masked(x, None, 1.0, x.shape), Digits(1.0, w.bound)))
            out.append(np.rint(x / w.precision) * w.precision)
        return out

    def any_negative(self, sums, digits, label, receivers):
        """Whether any of some sums is below zero; see `Shares.any_negative`."""
        return any(bool(self._value(expression(x))[0] < 0) for x in sums)

    def check(self, *numbers):
        """Raise RoundingError for numbers beyond their bounds; see `Shares.check`."""
        for x, digits in numbers:
            if not np.abs(x.factor).max(initial=0) <= digits.bound:
                raise RoundingError

    def _kept(self, x, unit):
        x = np.rint(x / unit) * unit
        return Secret(x, unit, x.shape)

    def _value(self, x):
        total = np.zeros(x.shape)
        for form, left, right, factor in x.products:
            value = form.clear([m.factor for m in left], [m.factor for m in right])
            unit = form.result(left, right)[0]
            total += value * (factor * x.unit / unit)
        for term, factor in x.terms:
            value = term.factor if isinstance(term, Masked) else term.part
            total += value * (factor * x.unit / term.unit)
        return total


class Shares:
    """Protocols on the shares of a session's three parties; see the module.

    Parameters
    ----------
    session : Session

    Attributes
    ----------
    failures : float
        bound on the expected number of roundings that went wrong so far.
    """

    def __init__(self, session):
        self.session = session
        self.failures = 0.0
        self._ahead = 0

    def own(self, values, owner, shape, digits):
        """Numbers of an owner; raises FixedPointOverflowError beyond the bound."""
        part = None
        if self.session.pid == owner:
            part = R128.encode(
                np.asarray(values) / digits.unit, 0, digits.bound / digits.unit
            )
        elif self.session.pid != HELPER:
            part = R128.zeros(shape)
        return Secret(part, digits.unit, tuple(shape))

    def map(self, linear, x):
        """A public linear map of masked numbers; local."""
        return Mapped(linear, x)

    def kept(self, x):
        """This owner's part of masked numbers, None at the helper: to be stored.

        It is uniform; the numbers are the sum of both parts.
        """
        return x.part

    def section(self, name):
        """Begin a section of the computation; see `Session.section`.

        What is multiplied in it must have been masked in it: see `renewed`.
        """
        self.session.section(name)

    def renewed(self, *numbers):
        """Masked numbers as a section may multiply them that they come from before.

        A helper that dealt ahead does not know which masks the last step of the section
        before gave them: then they are `masked` once more.
        """
        return self.masked(*numbers) if self.session.ahead else list(numbers)

    def settled(self, x, digits):
        """An expression that a later section may use, with all of its digits.

        For a helper that dealt ahead it is computed now (`secret`).
        """
        return self.secret(x, digits) if self.session.ahead else x

    def minus(self, x, y):
        """Masked numbers less others of the same unit and shape; local."""
        return Difference(x, y)

    def plus(self, x, constant):
        """Masked numbers and a public one, rounded to their unit; local."""
        pid = self.session.pid
        if pid == HELPER:
            return x
        number = R128.from_ints(round(constant / x.unit))
        number = np.broadcast_to(number, x.factor.shape).copy()
        part = R128.add(x.part, number) if pid == MOVING else x.part
        return Masked(R128.add(x.factor, number), part, x.unit, x.shape)

    def masked(self, *numbers):
        """Numbers ready to be multiplied.

        Rounds: 1. Elements: 2 per number.
        """
        return self._exchanged(
            x if x.part is None else Secret(x.part.copy(), x.unit, x.shape)
            for x in numbers
        )

    def given(self, owner, *numbers):
        """Numbers that an owner knows, as `own` makes them, ready to be multiplied.

        Their masks are the owner's alone, and the helper's.

        Rounds: 1. Elements: 1 per number.

        Parameters
        ----------
        owner : int
        *numbers : Secret
        """
        s, other, out = self.session, MOVING + STATIC - owner, []
        for x in numbers:
            shape = R128.storage(x.shape)
            if s.pid == other:
                hidden = np.empty(shape, dtype=R128.dtype)
                s.network.receive(owner, "given", hidden)
                out.append(Masked(hidden, x.part, x.unit, x.shape))
                continue
            peer = owner if s.pid == HELPER else HELPER
            mask = protocols.drawn(s, peer, "given", shape, R128.dtype)
            if s.pid == HELPER:
                # The moving owner's part of the mask less the static owner's.
                mask = mask if owner == MOVING else R128.neg(mask)
            else:
                s.network.send(other, "given", R128.sub(x.part, mask))
                add_into(mask, x.part)
            out.append(Masked(mask, x.part, x.unit, x.shape))
        return out

    def _exchanged(self, numbers):
        """Mask numbers one after the other, and exchange them between the owners.

        What is sent is on its way while the next are computed. Large arrays go in
        pieces: what is not yet received must not pile up at the other owner.
        """
        s, out, pending, size = self.session, [], [], 0
        for x in numbers:
            # The helper needs no more of a mask than the difference of its parts.
            mask = protocols.pad(s, "masked", (*x.shape, 2), plus=R128.sub)
            if s.pid == HELPER:
                out.append(Masked(mask, None, x.unit, x.shape))
                continue
            # In its place: fresh memory costs more than the sums.
            hidden = np.ascontiguousarray(x.part)
            R128.kernels.sub(R128.flat(hidden), R128.flat(mask), R128.flat(hidden))
            both = (_pieces(R128.flat(array)) for array in (hidden, mask))
            for piece in zip(*both, strict=True):
                s.network.send(MOVING + STATIC - s.pid, "masked", piece[0])
                pending.append(piece)
                size += len(piece[0])
                if size > 2 * PIECE:
                    self._receive(pending[:-1])
                    pending, size = pending[-1:], len(piece[0])
            out.append(Masked(hidden, mask, x.unit, x.shape))
        self._receive(pending)
        return out

    def _receive(self, pending):
        """Make factors and parts of what was sent, the masks and what is received."""
        if not pending:
            return
        s = self.session
        sizes = [(len(hidden),) for hidden, _ in pending]
        theirs = [scratch(f"theirs-{k}", n) for k, n in enumerate(sizes)]
        s.network.receive_all({MOVING + STATIC - s.pid: theirs}, "masked")
        for (hidden, mask), received in zip(pending, theirs, strict=True):
            R128.kernels.join(hidden, received, s.pid == MOVING, mask)

    def fresh(self, *wanted):
        """Expressions with the digits wanted, ready to be multiplied.

        Rounds: 1. Elements: 3 per number, 2 for what is no product.
        """
        return self._exchanged(self.secret(*w) for w in wanted)

    def secret(self, x, digits, plus=()):
        """An expression with the digits wanted; those of `plus` are added in the end.

        Rounds: 0. Elements: 1 per number, from the helper.

        Parameters
        ----------
        x : Expression, Masked or Secret
        digits : Digits
        plus : sequence of Masked, optional
            of the unit wanted.

        Raises
        ------
        FixedPointOverflowError
            if the ring has no room for the numbers promised.
        """
        x = expression(x)
        part = self._part(x)
        if x.products:
            part = self._corrected(part, x.shape)
        return self._rounded(x, part, digits, plus)

    def _rounded(self, x, part, digits, plus=()):
        """See `secret`; of this party's part of the expression."""
        s = self.session
        bits, unit = dropped(x, digits, plus)
        bound = int(digits.bound / unit * 2.0**bits) + 1
        if 2 * bound >= R128.modulus:
            raise FixedPointOverflowError(
                f"numbers of {bound.bit_length()} bits do not fit {R128!r}"
            )
        if bits:
            self.failures += 3 * bound / R128.modulus * math.prod(x.shape)
        if s.pid == HELPER:
            return Secret(None, unit, x.shape)
        if bits:
            protocols.truncate_part(s.pid, R128, part, bound, bits, R128, out=part)
        for masked in plus:
            add_into(part, masked.part)
        return Secret(part, unit, x.shape)

    def rates(self, norms, longest, power, digits):
        """`longest` over a power's root of each number.

        The root of the middle of the two powers of two that the number lies between,
        in units of its own; of numbers below 2**8 units that of 2**8.

        Rounds: 2. Bytes: 128 + 64 per number, and what `steps.deal` costs.

        Parameters
        ----------
        norms : sequence of Secret, shape (1,)
            not negative; below 2**102 units.
        longest : float
        power : int
        digits : Digits

        Returns
        -------
        rates : list of Masked, shape (1,)
        """
        s, n = self.session, len(norms)
        values = R128.from_ints(
            step_heights(norms[0].unit, longest, power, digits.unit)
        )
        thresholds = R128.from_ints([1 << k for k in RATE_STEPS[1:]])
        jumps = R128.sub(values[1:], values[:-1])
        part = R128.zeros((n,))
        if s.pid != HELPER:
            part = np.concatenate([x.part for x in norms])
        part = self._step_function(part, thresholds, jumps, "norm")
        if s.pid == MOVING:
            part = R128.add(part, np.repeat(values[:1], n, axis=0))
        parts = [None] * n if s.pid == HELPER else list(part[:, None])
        return self.masked(*(Secret(part, digits.unit, (1,)) for part in parts))

    def stepped(self, x, thresholds, values, digits, unit):
        """A step function of a number.

        Rounds: 1. Bytes: 64, and what `steps.deal` costs.

        Parameters
        ----------
        x : Expression, shape (1,)
            no product.
        thresholds : sequence of float
            rising.
        values : sequence of float
            below the first threshold, from it on, from the second on, and so on.
        digits : Digits
            promised of x.
        unit : float
            of the values.

        Returns
        -------
        y : Secret, shape (1,)
        """
        s, x = self.session, self.secret(x, digits)
        heights = [round(v / unit) for v in values]
        part = self._step_function(
            R128.zeros((1,)) if s.pid == HELPER else x.part,
            R128.from_ints([round(t / x.unit) for t in thresholds]),
            R128.from_ints(np.diff(np.array(heights, dtype=object))),
            "stepped",
            _compared_bits(digits, x.unit),
        )
        if s.pid == MOVING:
            part = R128.add(part, R128.from_ints(heights[:1]))
        return Secret(None if s.pid == HELPER else part, unit, (1,))

    def reached(self, groups, digits):
        """Open how many numbers of each group reach their thresholds.

        Rounds: 2, or 3 where a number is a product. Bytes: 64 for each number, 16 more
        for a product, what `steps.deal` costs, and 32 for each group and receiver.

        Parameters
        ----------
        groups : sequence of (numbers, label, receivers)
            numbers being pairs of an Expression, of shape (1,), and a threshold.
        digits : Digits
            promised of the numbers.

        Returns
        -------
        counts : list of int or None
            None where they are not opened.
        """
        s = self.session
        pairs = [pair for numbers, _, _ in groups for pair in numbers]
        part, unit = R128.zeros((len(pairs),)), math.inf
        for k, (x, threshold) in enumerate(pairs):
            x = self.secret(x, digits)
            unit = min(unit, x.unit)
            if s.pid != HELPER:
                part[k] = x.part[0]
            if s.pid == MOVING:
                less = R128.from_ints([round(threshold / x.unit)])
                part[k] = R128.sub(part[k : k + 1], less)[0]
        bits = _compared_bits(digits, unit)
        one = R128.from_ints([1])
        part = self._step_function(part, R128.zeros((1,)), one, "reached", bits)
        openings, start = [], 0
        for numbers, label, receivers in groups:
            stop = start + len(numbers)
            total = R128.dot(part[start:stop], np.repeat(one, len(numbers), axis=0))
            count = SharedArray(
                R128, total, 2, 0, len(numbers), choices=len(numbers) + 1
            )
            openings.append((count, label, tuple(receivers)))
            start = stop
        opened = s.open_all(openings)
        return [None if x is None else round(x[0]) for x in opened]

    def shown(self, *wanted):
        """Open numbers to a precision; what this party sees of them.

        The helper adds a number to each that is uniform and as wide as the precision
        and that no receiver knows, so that what is opened is as good as rounded.

        Rounds: 1. Elements: 2 per number and receiver.

        Parameters
        ----------
        wanted : sequence of Opening

        Returns
        -------
        values : list of array or None
            those of each opening, stacked.
        """
        openings = []
        for w in wanted:
            part, bits = self._scaled(w)
            array = SharedArray(R128, part, 2, bits, (1 << 127) - 1)
            array = protocols.blur(self.session, array, bits, HELPER)
            openings.append((array, w.label, tuple(w.receivers)))
        opened = self.session.open_all(openings)
        for x, w in zip(opened, wanted, strict=True):
            if x is not None and np.abs(x).max() > w.bound / w.precision + 1:
                raise RoundingError
        return [
            None if x is None else x * w.precision
            for x, w in zip(opened, wanted, strict=True)
        ]

    def _scaled(self, opening):
        """This party's parts of numbers to be shown, and the precision's place.

        In units of which the precision is a power of two, so large that the ring has no
        room for more than what is promised: the rest cannot be shown.
        """
        x = [expression(x) for x in opening.numbers]
        if any(k.products or not math.isclose(k.unit, x[0].unit) for k in x):
            raise ValueError("only numbers of one unit are shown, no products")
        bits = opening.noise_bits
        factor = max(round(x[0].unit / opening.precision * 2.0**bits), 1)
        return np.stack([R128.scale(self._part(k), factor) for k in x]), bits

    def any_negative(self, sums, digits, label, receivers):
        """Whether any of some sums is below zero: one bit, opened.

        Rounds: 2, one more of several sums, and one more of products. Bytes: 64 for
        each sum and 16 more for a product, 64 for several, what `steps.deal` costs, and
        32 for each receiver.

        Parameters
        ----------
        sums : sequence of Expression, shape (1,)
            of one unit.
        digits : Digits
            what is below their unit may be taken for 0.
        label : str
        receivers : sequence of int

        Returns
        -------
        negative : bool or None
            None where it is not opened.
        """
        opened = self.session.open(self.negative(sums, digits), label, receivers)
        return None if opened is None else bool(round(opened[0]))

    def negative(self, sums, digits):
        """What `any_negative` opens, on shares.

        Returns
        -------
        bit : SharedArray, shape (1,)
        """
        s, n, one = self.session, len(sums), R128.from_ints([1])
        # Two more digits: rounding takes up to one unit of them.
        digits = digits._replace(unit=digits.unit / 4)
        secrets = [self.secret(expression(x).times(4).over(4), digits) for x in sums]
        part = R128.zeros((n,))
        if s.pid != HELPER:
            part = np.concatenate([x.part for x in secrets])
        bits = _compared_bits(digits, secrets[0].unit)
        part = self._step_function(part, R128.zeros((1,)), one, "sign", bits)
        if n > 1:
            # Whether as many as there are reach zero.
            total = R128.dot(part, np.repeat(one, n, axis=0))
            all_of_them, bits = R128.from_ints([n]), n.bit_length() + 3
            part = self._step_function(total, all_of_them, one, "signs", bits)
        part = R128.neg(part)
        if s.pid == MOVING:
            part = R128.add(part, one)
        return SharedArray(R128, part, 2, 0, 1, choices=2)

    def check(self, *numbers):
        """Find out whether a rounding went wrong: below, in or above its range.

        Such a number is off by the size of the ring, and so is what is computed of it.
        A sum of all with small random weights, which only the owners know, is in its
        range if no rounding went wrong, and else hardly ever.

        Rounds: 2. Bytes: 128 and 96, and what `steps.deal` costs for two steps.

        Parameters
        ----------
        numbers : sequence of (Masked, Digits)

        Raises
        ------
        RoundingError
            at all parties, but for a helper that deals ahead.
        """
        s, total, bound = self.session, R128.zeros((1,)), 0
        for x, digits in numbers:
            n = math.prod(x.shape)
            bound += int(digits.bound / x.unit) * n * 256
            if s.pid == HELPER:
                continue
            weights = np.empty(n, dtype=np.uint8)
            s.stream(MOVING + STATIC - s.pid, b"check").fill(weights)
            weights = weights % np.uint8(255) + np.uint8(1)
            part = R128.flat(self.kept(x))
            add_into(total, R128.dot(part, R128.encode_int(weights)))
        if bound >> steps.MOST_BITS - 4:
            raise FixedPointOverflowError(
                f"numbers that add up to {bound.bit_length()} bits cannot be checked"
            )
        if s.pid == MOVING:
            add_into(total, R128.from_ints([bound]))
        thresholds = R128.from_ints([0, 2 * bound])
        jumps = R128.from_ints([1, -1])
        part = self._step_function(total, thresholds, jumps, "check", steps.MOST_BITS)
        inside = SharedArray(R128, part, 2, 0, 1, choices=2)
        opened = s.open(inside, "whole", (MOVING, STATIC, HELPER))
        if opened is not None and round(opened[0]) != 1:
            raise RoundingError

    def _step_function(self, part, thresholds, jumps, name, bits=steps.BITS):
        """This party's part of a step function of numbers; see `steps`. Rounds: 1."""
        s, n = self.session, len(part)
        self._count(steps.elements(n, len(thresholds), bits))
        mask = protocols.pad(s, name, (n, 2), plus=R128.add)
        receive, dealt = protocols.with_dealt(
            s,
            lambda: steps.deal(s, mask, thresholds, jumps, bits),
            lambda: protocols.open_masked(
                s, SharedArray(R128, part, 2, 0, 1 << bits - 2), mask, name
            ),
        )
        masked = receive()
        if s.pid == HELPER:
            return R128.zeros((n,))
        return steps.look_up(s, masked, dealt, jumps)

    def _corrected(self, part, shape):
        """An owner's part with its part of the correction; the helper sends it."""
        s = self.session
        for piece in _pieces(R128.flat(part)):
            self._count(len(piece))
            dealt = protocols.deal(
                s,
                "correction",
                piece if s.pid == HELPER else None,
                piece.shape,
                minus=R128.sub,
                out=scratch("correction", piece.shape[:1]),
            )
            if s.pid != HELPER:
                R128.kernels.add(piece, dealt, piece)
        return part

    def _count(self, elements):
        """Count what the helper sends ahead, and let it wait in time.

        It needs nothing of them, and would fill the memory of the static owner, to whom
        nearly all of it goes. That one says that it is here (`Session.pace`), and not
        the moving owner, which may have to wait for the static one first.
        """
        self._ahead += elements
        if self._ahead <= 2 * PIECE:
            return
        self._ahead = elements
        self.session.pace()

    def _part(self, x):
        """This party's part of an expression, without the correction.

        Where there are products, twice that; see the module.
        """
        helps = self.session.pid == HELPER
        out = R128.zeros(x.shape)
        for form, left, right, factor in x.products:
            left, right = ([m.factor for m in side] for side in (left, right))
            form.ring(left, right, out, -2 * factor if helps else factor)
        if helps:
            return out
        for term, factor in x.terms:
            factor *= 2 if x.products else 1
            part = term.part if factor == 1 else R128.scale(term.part, factor)
            add_into(out, part)
        return out
