r"""The language of protocols (`algebra`) on the parts of two owners alone.

A number is :math:`x = x' + x''` modulo 2**128, the first part the moving owner's, the
second the static owner's. A form f, which is linear in its left and in its right side,
is computed by

.. math:: f(x, y) = f(x', y') + f(x'', y'') + f(x', y'') + f(x'', y'),

of which each owner has one of the first two terms. The others are sums of *elementary
products* (`Product.factors`) of a number u of the moving owner and a number v of the
static owner. For each there is one of `session.multiplications`: random numbers a of
the moving and b of the static owner, and parts p and q of a b. The owners send each
other :math:`U = u - a` and :math:`V = v - b`; then

.. math:: u v = (u V + p) + (U b + q).

Nothing is masked before: numbers that were `masked` are the parts themselves. The
elementary products of all expressions that are made `fresh` together go in one message.
Where only one owner knows the numbers (`given`), or left and right of a symmetric form
are the same, one of the two crossed terms is enough.

Results come twice as large as the products, as with a helper, so that the same digits
are dropped (`algebra.dropped`), and are rounded in the same way: each owner shifts its
part. Comparisons are circuits (`circuits`).

===============  ======================================  =============================
verb             rounds                                  bytes, on both links
===============  ======================================  =============================
`own`, `masked`  0                                       0
`given`          0                                       0
`fresh`          1, or none without products             32 per elementary product
`secret`         1, or none without a product            32 per elementary product
`shown`          1                                       16 per number and receiver
`rates`          1 and those of `bits_of` and `highest`  of these, see `circuits`
`stepped`        1 and those of `negative`               of that
`reached`        2 and those of `negative`; 1 more       of that, 16 per group and
                 where a number is a product             receiver, 32 per product
`any_negative`   1 and those of `negative` and           of these, 8 per receiver,
                 `any_set`; 1 more for products          32 per product
`check`          2 and those of `negative`               of that, and 32
===============  ======================================  =============================

More than `PIECE` elementary products take a round for each so many. What is made ahead
of them, and what that costs, says `multiplications`.

**What each owner sees.** U or V, each less a random number of which it knows nothing
and that serves once: uniform, a simulator draws it. Of circuits see there. What is
opened is told by the other owner's part, which is the number less one's own.

**Rounded openings.** Where a helper would add noise, the other owner's own digits are
the noise: it sends its part with the digits below the precision cleared, and half a
unit in their place. The receiver adds its own part and is off by half a unit at most,
evenly either way. Where both receive, each also clears its own, so that both find the
same number: the multiple of the precision above or below, right on average. Either way
it learns of the number in which interval of one unit it lies, whose place its own part
determines: that is a simulator's input, and all that it needs.
"""

import numpy as np

from dipy_ppir.mpc import circuits
from dipy_ppir.mpc.algebra import (
    RATE_STEPS,
    Difference,
    Mapped,
    Masked,
    Secret,
    Shares,
    add_into,
    expression,
    step_heights,
)
from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.errors import RoundingError
from dipy_ppir.mpc.fields import R64, R128
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.protocols import constant

#: Products whose factors go in one message, of 4 MB.
PIECE = 1 << 18
#: How many products are added up ahead, of at least how many sums.
SUMMED, MANY = (8, 4, 2, 1), 1024
#: Numbers of which `rates` tells the size are below this power of two.
RATE_BITS = RATE_STEPS[-1] + 1


class Given(Masked):
    """Numbers that one owner knows, the other's part of which is zero.

    Attributes
    ----------
    owner : int
    """

    def __init__(self, owner, x):
        super().__init__(None, x.part, x.unit, x.shape)
        self.owner = owner


def owner_of(x):
    """The owner that knows masked numbers; None where neither does."""
    if isinstance(x, Given):
        return x.owner
    if isinstance(x, Mapped):
        return owner_of(x.x)
    if isinstance(x, Difference):
        owners = {owner_of(x.x), owner_of(x.y)}
        return owners.pop() if len(owners) == 1 else None
    return None


def _flat(x):
    """A packed array as rows, for the kernels."""
    return R128.flat(np.ascontiguousarray(x))


def _has_part(arrays, owner):
    """Whether an owner's part of any of some arrays may be other than zero."""
    return any(owner_of(x) in (None, owner) for x in arrays)


def _crossed(x):
    """Products in an expression of which one side is one owner's and one the other's.

    Yields
    ------
    form, sides
    left : int
        the owner whose parts are taken of the left side.
    factor : int
    """
    for form, *sides, factor in x.products:
        if form.symmetric and all(a is b for a, b in zip(*sides, strict=True)):
            lefts, factor = (MOVING,), 2 * factor
        else:
            lefts = MOVING, STATIC
        for left in lefts:
            owners = left, MOVING + STATIC - left
            if all(map(_has_part, sides, owners)):
                yield form, sides, left, 2 * factor


class _Sum:
    """Elementary products of a kind that are added up number by number.

    Parameters
    ----------
    form, kind
        see `Product.collect`.
    shape : tuple of int
        of each factor, packed.
    out : array
        an expression's part, to which they are added.

    Attributes
    ----------
    factors : list of array, shape (n, 2)
        this owner's.
    parts : array, shape (n, 2)
        of the sums of products.
    """

    def __init__(self, form, kind, shape, out):
        self.form, self.kind, self.shape, self.out = form, kind, shape, out
        self.factors, self.parts = [], None

    def collect(self):
        """Add what comes of this owner's parts of the sums to its part of the form."""
        self.form.collect(self.kind, self.parts.reshape(self.shape), self.out)


def _grouped(factors):
    """Factors of a sum in groups, the products of each of which are made together.

    What is added up ahead is cheaper, but made in batches, too many for few numbers.
    """
    sizes = SUMMED if len(factors[0]) >= MANY else (1,)
    start = 0
    for size in sizes:
        while len(factors) - start >= size:
            yield factors[start : start + size]
            start += size


def _clear(part, bits):
    """Clear the low bits of one's part, and put half of their range in their place."""
    low, high = part[..., 0], part[..., 1]
    low &= np.uint64(max(0, (1 << 64) - (1 << min(bits, 64))))
    high &= np.uint64((1 << 64) - (1 << max(bits - 64, 0)))
    add_into(part, constant(R128, 1 << bits - 1, part))


class PairShares(Shares):
    """Protocols on the parts of a session's two owners; see the module.

    Parameters
    ----------
    session : PairSession

    Attributes
    ----------
    failures : float
        see `Shares`.
    """

    def kept(self, x):
        """This owner's part of masked numbers: to be stored.

        It is a number that the owner has drawn at random, rounded, or made of what it
        was sent, and says nothing of the secret.
        """
        return x.part

    def plus(self, x, constant):
        """Masked numbers and a public one, rounded to their unit; local."""
        if self.session.pid != MOVING:
            return Masked(None, x.part, x.unit, x.shape)
        number = R128.from_ints(round(constant / x.unit))
        number = np.broadcast_to(number, x.part.shape).copy()
        return Masked(None, R128.add(x.part, number), x.unit, x.shape)

    def masked(self, *numbers):
        """Numbers ready to be multiplied. Rounds: 0."""
        return [Masked(None, x.part, x.unit, x.shape) for x in numbers]

    def given(self, owner, *numbers):
        """Numbers that an owner knows, as `own` makes them; see the module. Rounds: 0.

        Parameters
        ----------
        owner : int
        *numbers : Secret
        """
        return [Given(owner, x) for x in numbers]

    def fresh(self, *wanted):
        """Expressions with the digits wanted, ready to be multiplied.

        Rounds: 1. Bytes: 32 per elementary product.
        """
        return self.masked(*self._secrets(wanted))

    def secret(self, x, digits, plus=()):
        """See `Shares.secret`. Rounds: 1. Bytes: 32 per elementary product."""
        return self._secrets([(x, digits, plus)])[0]

    def _secrets(self, wanted):
        """What `secret` makes of several expressions, in one round."""
        wanted = [(expression(x), *others) for x, *others in wanted]
        parts, terms = [], []
        for x, *_ in wanted:
            part = self._part(x)
            crossed = list(_crossed(x))
            terms += [(x, part, *term) for term in crossed]
            parts.append(part if crossed else self._moved(part))
        self._multiply(terms)
        each = zip(wanted, parts, strict=True)
        return [self._rounded(x, part, *others) for (x, *others), part in each]

    def _moved(self, part):
        """This owner's part, less or more a number that both draw.

        Parts that are shifted must be random for the sum to be right, and need not be
        secret for that. Those of products are.
        """
        s = self.session
        drawn = s.stream(s.other, b"parts").words(part.shape)
        return (R128.add if s.pid == MOVING else R128.sub)(part, drawn)

    def _part(self, x):
        """This owner's part of an expression, without what is the other's as well.

        Where there are products, twice that; see the module.
        """
        out = R128.zeros(x.shape)
        for form, left, right, factor in x.products:
            left, right = ([m.part for m in side] for side in (left, right))
            form.ring(left, right, out, 2 * factor)
        for term, factor in x.terms:
            factor *= 2 if x.products else 1
            part = term.part if factor == 1 else R128.scale(term.part, factor)
            add_into(out, part)
        return out

    def _multiply(self, terms):
        """Compute what is crossed in expressions, see `_crossed`, and add it to parts.

        Parameters
        ----------
        terms : sequence of (expression, part, form, sides, left, factor)
        """
        sums, size, last = {}, 0, None
        for x, part, form, sides, left, factor in terms:
            if size > PIECE and part is not last:
                self._add_up(sums.values())
                sums, size = {}, 0
            last = part
            # Of the left side the parts of one owner, of the right the other's.
            side = 0 if left == self.session.pid else 1
            arrays = [m.part for m in sides[side]]
            for kind, mine in form.factors(side, arrays, x.shape):
                key = id(part), id(form), kind, mine.shape
                into = sums.setdefault(key, _Sum(form, kind, mine.shape, part))
                rows = _flat(mine)
                if self.session.pid == MOVING and factor != 1:
                    rows = R128.scale(rows, factor)
                into.factors.append(rows)
                size += len(rows)
        if sums:
            self._add_up(sums.values())

    def _add_up(self, sums):
        """Compute the products of some `_Sum`, and collect this owner's parts."""
        begun, size = [], 0
        for each in sums:
            n, terms = len(each.factors[0]), len(each.factors)
            each.parts = R128.zeros((n,))
            step = max(PIECE // terms, 1)
            for start in range(0, n, step):
                if size and size + terms * min(step, n - start) > PIECE:
                    self._exchange(begun)
                    begun, size = [], 0
                place = slice(start, start + step)
                out = each.parts[place]
                begun.append(([x[place] for x in each.factors], out))
                size += terms * len(out)
        self._exchange(begun)
        for each in sums:
            each.collect()

    def _exchange(self, sums):
        """This owner's parts of sums of products of its numbers and the other's.

        Rounds: 1. Bytes: 32 per product.

        Parameters
        ----------
        sums : sequence of (factors, out)
            arrays of shape (n, 2), and zeros to which to add what comes of them.
        """
        s, batches = self.session, []
        jobs = [(some, out) for factors, out in sums for some in _grouped(factors)]
        for terms in sorted({len(some) for some, _ in jobs}):
            same = [job for job in jobs if len(job[0]) == terms]
            # Factor by factor, of all sums of so many.
            rows = (np.concatenate(x) for x in zip(*(f for f, _ in same), strict=True))
            mine = np.stack(list(rows))
            batches.append((same, mine, *s.multiplications.sums(mine.shape[1], terms)))
        hidden = [R128.flat(R128.sub(mine, drawn)) for _, mine, drawn, _ in batches]
        hidden = np.concatenate(hidden) if len(hidden) > 1 else hidden[0]
        s.network.send(s.other, "factors", hidden)
        theirs, start = np.empty_like(hidden), 0
        s.network.receive(s.other, "factors", theirs)
        for same, mine, drawn, parts in batches:
            for row in mine if s.pid == MOVING else drawn:
                R128.addmul(parts, theirs[start : start + len(row)], row)
                start += len(row)
            at = 0
            for _, out in same:
                add_into(out, parts[at : at + len(out)])
                at += len(out)

    def rates(self, norms, longest, power, digits):
        """See `Shares.rates`: by the highest bits of the numbers.

        Rounds: 1, and those of `circuits.bits_of` and `circuits.highest`.
        """
        s, n = self.session, len(norms)
        heights = step_heights(norms[0].unit, longest, power, digits.unit)
        words = np.concatenate([x.part for x in norms])
        bits = circuits.bits_of(s, words, R128, RATE_BITS)
        # What is smaller is of the lowest height.
        first = RATE_STEPS[0] + 1
        places = circuits.highest(s, bits)[first:]
        jumps = [h - heights[0] for h in heights[1:]]
        part = circuits.weighted(s, places, jumps, R128, n)
        if s.pid == MOVING:
            part = R128.add(part, np.repeat(R128.from_ints(heights[:1]), n, axis=0))
        return self.masked(*(Secret(x, digits.unit, (1,)) for x in part[:, None]))

    def _step_function(self, part, thresholds, jumps, name, bits=128):
        """This owner's part of a step function of numbers of so many bits.

        Rounds: 1, and those of `circuits.negative`.
        """
        s, n, steps = self.session, len(part), len(thresholds)
        words = np.repeat(part, steps, axis=0)
        if s.pid == MOVING:
            words = R128.sub(words, np.tile(thresholds, (n, 1)))
        below = circuits.negative(s, words, R128, bits)
        reached = circuits.arithmetic(s, circuits.complement(s, below), R128, n * steps)
        steps = R128.mul(reached, np.tile(jumps, (n, 1))).reshape(n, steps, 2)
        total = R128.zeros((n,))
        for step in np.moveaxis(steps, 1, 0):
            add_into(total, np.ascontiguousarray(step))
        return total

    def shown(self, *wanted):
        """Open numbers to a precision; what this owner sees of them. See the module.

        Rounds: 1. Bytes: 16 per number and receiver.

        Parameters
        ----------
        wanted : sequence of Opening

        Returns
        -------
        values : list of array or None
        """
        s, openings = self.session, []
        for w in wanted:
            part, bits = self._scaled(w)
            part = self._moved(part)
            if s.other in w.receivers:
                _clear(part, bits)
            array = SharedArray(R128, part, 2, bits, (1 << 127) - 1, noise_bits=bits)
            openings.append((array, w.label, tuple(w.receivers)))
        out = []
        for x, w in zip(s.open_all(openings), wanted, strict=True):
            if x is not None and np.abs(x).max() > w.bound / w.precision + 1:
                raise RoundingError
            out.append(None if x is None else x * w.precision)
        return out

    def any_negative(self, sums, digits, label, receivers):
        """Whether any of some sums is below zero: one bit, opened.

        Rounds: 1 where sums are products, those of `circuits.negative` and
        `circuits.any_set`, and 1 to open.

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
        s, n = self.session, len(sums)
        secrets = self._secrets([(x, digits) for x in sums])
        bits = int(digits.bound / secrets[0].unit).bit_length() + 2
        words = np.concatenate([x.part for x in secrets])
        below = circuits.negative(s, words, R128, bits)
        each = np.unpackbits(below, count=n, bitorder="little")
        some = circuits.any_set(s, each[:, None]) & np.uint8(1)
        # The highest bit of a word is a sum modulo 2.
        word = some.astype(np.uint64) << np.uint64(63)
        bit = SharedArray(R64, word, 2, 63, (1 << 63) - 1, choices=2)
        opened = s.open(bit, label, receivers)
        return None if opened is None else bool(opened[0])
