r"""Boolean circuits on secret bits of two owners.

A secret bit is the sum modulo 2 of one bit of each owner; bits of n numbers are packed
as in `bitslices`, so that one gate works on all of them. Sums modulo 2 are local. A
product of a bit x of one owner and a string y of the other takes one random transfer
(Beaver 1995): of it the owner of y has pads :math:`m_0, m_1`, the owner of x a bit c
and :math:`m_c`. They send each other

.. math:: d = y - (m_1 - m_0), \qquad e = x + c \bmod 2,

in one round, and have parts of the product: the one :math:`x d + (-1)^e m_c`, the other
:math:`m_1` where e is 1 and :math:`-m_0` where it is 0. Strings are added modulo 2, or
as elements of a ring. A string costs one transfer, whatever its length, so most
circuits here are written as products of a bit and a string.

What each owner sees: d is hidden by a pad that it has not got, e by a choice of which
it knows nothing. Both are uniform, since each transfer is used once: a simulator draws
them. Nothing is opened.

Per number, if they are a multiple of 8 (fewer cost as many as 8), w bytes of a word;
logarithms are rounded up. A transfer is made ahead with 4 bytes more, see `transfers`:

================  ================  ============  ====================================
step              rounds            transfers     bytes on both links
================  ================  ============  ====================================
`own_and`         1                 1             1/4 per product
`and_`            1                 2             1/2 per product
`select`          1                 2             (k + 1) / 4 per bit; strings of k bits
`any_set`         log2 k            2 (k - 1)     (k - 1) / 2
`bits_of` 32      6                 113           49.75
`bits_of` 64      7                 239           117.5
`bits_of` 128     8                 493           269.25
`negative`        1 + log2(k - 1)   3 k - 5       k - 1.75
`highest` 32      5                 62            27.75
`highest` 64      6                 126           63.75
`normalized`      log2 k            2 log2 k      (k + 1) / 4 log2 k
`monomials` 4     2                 10            4
`monomials` 5     3                 12            8
`monomials` 6     3                 18            16.5
`arithmetic`      1                 1             w + 1/8 per bit
`times`           1                 2             2 w + 1/4 per product
`lifted`          2 + log2 k        3 k - 1       k + w - 5/8
`steps`           2 + log2(k - 1)   3 k - 4       k - 1.625 + w per step
================  ================  ============  ====================================
"""

import numpy as np

from dipy_ppir.mpc import protocols
from dipy_ppir.mpc.bitslices import (
    gathered,
    packed,
    sliced,
    spread,
    width,
    words_sliced,
)
from dipy_ppir.mpc.fields import R32, R64, R128
from dipy_ppir.mpc.ledger import MOVING, STATIC

#: Bits of a pad, and so of the longest string.
LONGEST = 128


def complement(session, bits):
    """The other bits: ones for zeros; local."""
    return ~bits if session.pid == MOVING else bits


def own_and(session, mine):
    """Products of a bit of each owner.

    Rounds: 1. Transfers: 1 per product.

    Parameters
    ----------
    session : PairSession
    mine : array of uint8
        this owner's bits.

    Returns
    -------
    part : array of uint8
        of the bits that are 1 where both are.
    """
    bits, part = session.transfers.products(mine.size)
    flat = mine.reshape(-1)
    theirs = protocols.swap(session, "bits", flat ^ bits)()
    part = part ^ theirs & (bits if session.pid == MOVING else flat)
    return part.reshape(mine.shape)


def and_(session, x, y):
    """Products of secret bits.

    Rounds: 1. Transfers: 2 per product.

    Parameters
    ----------
    session : PairSession
    x, y : array of uint8
        parts of bits, of one shape.

    Returns
    -------
    part : array of uint8
    """
    crossed = own_and(session, np.stack([x, y] if session.pid == MOVING else [y, x]))
    return crossed[0] ^ crossed[1] ^ x & y


def select(session, bits, strings):
    """Products of secret bits and secret strings.

    Rounds: 1. Transfers: 2 per bit.

    Parameters
    ----------
    session : PairSession
    bits : array of uint8, shape (..., m)
        parts of bits.
    strings : array of uint8, shape (k, ..., m)
        parts of strings of at most 128 bits.

    Returns
    -------
    part : array of uint8, shape (k, ..., m)
        of the strings where the bits are 1, zeros elsewhere.
    """
    k = len(strings)
    if not 0 < k <= LONGEST:
        raise ValueError(f"strings have 1 to {LONGEST} bits, not {k}")
    if strings.shape[1:] != bits.shape:
        raise ValueError(
            f"bits of shape {bits.shape} select no strings of shape {strings.shape[1:]}"
        )
    x, y = np.ascontiguousarray(bits).reshape(-1), strings.reshape(k, -1)
    transfers, count = session.transfers, 8 * x.size
    pads = {p: transfers.pads(count, p) for p in (MOVING, STATIC)}
    sent, chosen = pads[session.pid], pads[session.other]
    first = _strings(sent.first, k)
    both = first ^ _strings(sent.second, k)
    message = np.empty((k + 1, x.size), dtype=np.uint8)
    np.bitwise_xor(y, both, out=message[:k])
    np.bitwise_xor(x, packed(chosen.choices), out=message[k])
    theirs = protocols.swap(session, "strings", message)()
    part = theirs[:k] ^ y
    part &= x
    part ^= _strings(chosen.pad, k)
    both &= theirs[k]
    part ^= both
    part ^= first
    return part.reshape(strings.shape)


def _strings(pads, k):
    """The first bits of pads, sliced."""
    rows = pads.view(np.uint8).reshape(len(pads), -1)
    return sliced(rows[:, : width(k)])[:k]


def _select_all(session, selections):
    """Several `select`, of bits (s, m) and strings (k, s, m), in one round."""
    k = max(len(strings) for _, strings in selections)
    bits = np.concatenate([bits for bits, _ in selections])
    both = np.zeros((k, *bits.shape), dtype=np.uint8)
    start, places = 0, []
    for some, strings in selections:
        places.append((len(strings), slice(start, start + len(some))))
        start += len(some)
        both[: len(strings), places[-1][1]] = strings
    part = select(session, bits, both)
    return [part[:length, place] for length, place in places]


def bits_of(session, words, ring, bits):
    """The bits of a sum of two owners' words, modulo ``2**bits``.

    Rounds: 1 and the logarithm of ``bits - 1``, rounded up: carries are found by a
    prefix tree (Sklansky 1960). Transfers: 113 per number of 32 bits, 239 of 64, 493
    of 128.

    Parameters
    ----------
    session : PairSession
    words : array, shape ``ring.storage((n,))``
        this owner's part.
    ring : Ring
    bits : int
        how many, from the lowest.

    Returns
    -------
    part : array of uint8, shape (bits, ceil(n / 8))
    """
    mine = words_sliced(words, ring, bits)
    if bits == 1:
        return mine
    # Where a carry is made, and where one is handed on.
    made, handed = own_and(session, mine[:-1]), mine[:-1].copy()
    count, half = bits - 1, 1
    while half < count:
        lows = np.arange(half - 1, count - 1, 2 * half)
        if half == 1:
            highs = lows + 1
            pairs = np.stack([made[lows], handed[lows]])
            got = select(session, handed[highs], pairs)
            made[highs] ^= got[0]
            handed[highs] = got[1]
        else:
            _join(session, made, handed, lows, half)
        half *= 2
    mine[1:] ^= made
    return mine


def _join(session, made, handed, lows, half):
    """A level of the prefix tree: blocks of `half` above each of `lows`, which end
    another one."""
    count = len(made)
    highs = lows + np.arange(1, min(half, count - half) + 1)[:, None]
    inside = highs < count
    strings = np.where(inside[..., None], handed[np.minimum(highs, count - 1)], 0)
    # What the lowest block hands on is nothing.
    selectors = np.concatenate([made[lows], handed[lows[1:]]])
    strings = np.concatenate([strings, strings[:, 1:]], axis=1)
    got = select(session, selectors, strings)
    made[highs[inside]] ^= got[:, : len(lows)][inside]
    handed[highs[:, 1:][inside[:, 1:]]] = got[:, len(lows) :][inside[:, 1:]]


def negative(session, words, ring, bits):
    """The highest bit of a sum of two owners' words modulo ``2**bits``.

    Rounds: 1 and the logarithm of ``bits - 1``, rounded up. Transfers: ``3 * bits - 5``
    per number.

    Parameters
    ----------
    session, words, ring, bits
        see `bits_of`. The numbers are signed.

    Returns
    -------
    part : array of uint8, shape (ceil(n / 8),)
        of bits that are 1 where the numbers are negative.
    """
    mine = words_sliced(words, ring, bits)
    if bits == 1:
        return mine[0]
    return mine[-1] ^ _carry(session, mine[:-1])


def _carry(session, mine):
    """What two owners' numbers, given by their bits, carry over.

    Rounds: 1 and the logarithm of their number, rounded up.
    """
    made, handed = own_and(session, mine), mine
    while len(made) > 1:
        pairs = len(made) // 2
        lower = np.stack([made[: 2 * pairs : 2], handed[: 2 * pairs : 2]])
        got = select(session, handed[1 : 2 * pairs : 2], lower)
        got[0] ^= made[1 : 2 * pairs : 2]
        odd = slice(2 * pairs, None)
        made = np.concatenate([got[0], made[odd]])
        handed = np.concatenate([got[1], handed[odd]])
    return made[0]


def highest(session, bits):
    """The highest bit that is 1, as one of k.

    Rounds: the logarithm of k, rounded up. Transfers: 62 per number of 32 bits, 126 of
    64: 2 per node of a prefix tree.

    Parameters
    ----------
    session : PairSession
    bits : array of uint8, shape (k, m)
        parts of the bits, lowest first.

    Returns
    -------
    part : array of uint8, shape (k, m)
        of bits of which only that one is 1; none, if there is none.
    """
    some = bits[::-1].copy()
    count, half = len(some), 1
    while half < count:
        tops = np.arange(half - 1, count - 1, 2 * half)
        below = tops + np.arange(1, min(half, count - half) + 1)[:, None]
        inside = below < count
        strings = np.where(inside[..., None], some[np.minimum(below, count - 1)], 0)
        # x or y is x and (not x) y.
        got = strings ^ select(session, some[tops], strings) ^ some[tops]
        some[below[inside]] = got[inside]
        half *= 2
    one = some.copy()
    one[1:] ^= some[:-1]
    return one[::-1]


def any_set(session, bits):
    """Whether any of k bits is 1.

    Rounds: the logarithm of k, rounded up. Transfers: ``2 * (k - 1)`` per number.

    Parameters
    ----------
    session : PairSession
    bits : array of uint8, shape (k, m)

    Returns
    -------
    part : array of uint8, shape (m,)
    """
    while len(bits) > 1:
        pairs = len(bits) // 2
        x, y = bits[: 2 * pairs : 2], bits[1 : 2 * pairs : 2]
        bits = np.concatenate([x ^ y ^ and_(session, x, y), bits[2 * pairs :]])
    return bits[0]


def position(onehot, values=None):
    """A public number for each place, of the place that is 1; local.

    Parameters
    ----------
    onehot : array of uint8, shape (k, m)
        parts of bits of which at most one is 1.
    values : sequence of int, optional
        not negative; by default the places' own numbers.

    Returns
    -------
    part : array of uint8, shape (bits, m)
        of the bits of the number, lowest first; 0 where no place is 1.
    """
    values = range(len(onehot)) if values is None else [int(v) for v in values]
    if len(values) != len(onehot) or min(values) < 0:
        raise ValueError(f"{len(onehot)} numbers from 0 are needed, one for each place")
    out = np.zeros((max(max(values).bit_length(), 1), onehot.shape[1]), np.uint8)
    for value, place in zip(values, onehot, strict=True):
        for b, row in enumerate(out):
            if value >> b & 1:
                row ^= place
    return out


def normalized(session, bits, onehot, kept):
    """The bits below the highest one.

    Rounds: the logarithm of k, rounded up. Transfers: 2 per round.

    Parameters
    ----------
    session : PairSession
    bits : array of uint8, shape (k, m)
        parts of the bits of numbers.
    onehot : array of uint8, shape (k, m)
        see `highest`.
    kept : int
        how many bits below it.

    Returns
    -------
    part : array of uint8, shape (kept, m)
        lowest first; zeros stand below the numbers' lowest bits.
    """
    k = len(bits)
    shifts = position(onehot, range(k - 1, -1, -1))
    whole = bits
    for step in reversed(range((k - 1).bit_length())):
        moved = np.zeros_like(whole)
        moved[1 << step :] = whole[: k - (1 << step)]
        whole = whole ^ select(session, shifts[step], whole ^ moved)
    below = np.zeros((kept, bits.shape[1]), np.uint8)
    some = min(kept, k - 1)
    below[kept - some :] = whole[k - 1 - some : k - 1]
    return below


def monomials(session, bits):
    """All products of some of k bits.

    Rounds: the logarithm of k, rounded up. Transfers: 2, 4, 10, 12, 18 for 2 to 6 bits.

    Parameters
    ----------
    session : PairSession
    bits : array of uint8, shape (k, m)

    Returns
    -------
    part : array of uint8, shape (2**k - 1, m)
        row i - 1 is of the product of the bits that are set in i.
    """
    groups = [bits[i : i + 1] for i in range(len(bits))]
    while len(groups) > 1:
        pairs = list(zip(groups[::2], groups[1::2], strict=False))
        selections = [
            (high, np.broadcast_to(low[:, None], (len(low), *high.shape)))
            for low, high in pairs
        ]
        joined = []
        for (low, high), got in zip(
            pairs, _select_all(session, selections), strict=True
        ):
            rows = np.concatenate([high[:, None], got.transpose(1, 0, 2)], axis=1)
            joined.append(np.concatenate([low, rows.reshape(-1, low.shape[1])]))
        groups = joined + groups[2 * len(pairs) :]
    return groups[0]


def _sums(values):
    """Coefficients modulo 2 of the products of bits, of a function's values."""
    values = [int(v) for v in values]
    step = 1
    while step < len(values):
        for i in range(len(values)):
            if i & step:
                values[i] ^= values[i ^ step]
        step *= 2
    return values


def table(session, bits, values):
    """A public function of k bits.

    Rounds and transfers: see `monomials`.

    Parameters
    ----------
    session : PairSession
    bits : array of uint8, shape (k, m)
        parts of the bits of the argument, lowest first.
    values : sequence of 2**k int
        the function's values, not negative.

    Returns
    -------
    part : array of uint8, shape (bits, m)
        of the bits of the value, lowest first.
    """
    if len(values) != 1 << len(bits) or min(values) < 0:
        raise ValueError(f"{1 << len(bits)} values from 0 are needed")
    return table_of(session, monomials(session, bits), values)


def table_of(session, products, values):
    """A public function of bits of which all products are there; local.

    Parameters
    ----------
    session : PairSession
    products : array of uint8
        see `monomials`.
    values : sequence of int
        see `table`.
    """
    constant, *factors = _sums(values)
    out = position(products, factors)
    length = max(constant.bit_length(), len(out))
    out = np.concatenate([out, np.zeros((length - len(out), out.shape[1]), np.uint8)])
    if session.pid == MOVING:
        for b in range(length):
            if constant >> b & 1:
                out[b] ^= 255
    return out


def minterms(session, bits):
    """Which of the 2**k numbers k bits are, as one of so many bits.

    Rounds and transfers: see `monomials`.

    Returns
    -------
    part : array of uint8, shape (2**k, m)
    """
    out = np.concatenate([np.zeros_like(bits[:1]), monomials(session, bits)])
    if session.pid == MOVING:
        out[0] = 255
    # The bits of i are all set, and no other.
    step = 1
    while step < len(out):
        halves = out.reshape(-1, 2, step, out.shape[1])
        halves[:, 0] ^= halves[:, 1]
        step *= 2
    return out


def _crossed(session, flags, words, ring, senders):
    """Parts of the products of one owner's bits with the other's words.

    Parameters
    ----------
    session : PairSession
    flags : array of bool, shape (n,)
        this owner's bits.
    words : array, shape ``ring.storage((n,))``
        this owner's words.
    ring : Ring
    senders : sequence of int
        the owners whose words are multiplied.
    """
    n = len(flags)
    pads = {p: session.transfers.pads(n, p) for p in senders}
    size = n * ring.nbytes
    sends, chooses = session.pid in senders, session.other in senders
    message = []
    if sends:
        first, second = (_words(pad, ring) for pad in pads[session.pid])
        hidden = ring.sub(words, ring.sub(second, first))
        message.append(hidden.reshape(-1).view(np.uint8))
    if chooses:
        choices, pad = pads[session.other]
        pad = _words(pad, ring)
        message.append(packed(flags ^ choices))
    session.network.send(session.other, "words", np.concatenate(message))
    theirs = np.empty((size if chooses else 0) + (width(n) if sends else 0), np.uint8)
    session.network.receive(session.other, "words", theirs)
    total = ring.zeros((n,))
    if chooses:
        got = theirs[:size].copy().view(ring.dtype).reshape(total.shape)
        swapped = flags ^ choices
        total = ring.add(_where(flags, got, ring), _signed(pad, swapped, ring))
    if sends:
        swapped = spread(theirs[len(theirs) - width(n) :], n)
        part = np.where(_wide(swapped, ring), second, ring.neg(first))
        total = ring.add(total, part)
    return total


def _words(pads, ring):
    """The first word of each pad."""
    if ring is R128:
        return pads
    return pads[:, 0].astype(ring.dtype, order="C")


def _wide(flags, ring):
    return flags[:, None] if ring.words == 2 else flags


def _where(flags, words, ring):
    return np.where(_wide(flags, ring), words, ring.dtype(0))


def _signed(words, minus, ring):
    return np.where(_wide(minus, ring), ring.neg(words), words)


def _check_ring(ring):
    if ring not in (R32, R64, R128):
        raise ValueError(f"parts of words are in a ring, not in {ring!r}")


def arithmetic(session, bits, ring, n):
    """Secret bits as sums of two words: 0 or 1.

    Rounds: 1. Transfers: 1 per bit.

    Parameters
    ----------
    session : PairSession
    bits : array of uint8, shape (..., ceil(n / 8))
    ring : {R32, R64, R128}
    n : int

    Returns
    -------
    part : array, shape ``ring.storage((..., n))``
    """
    _check_ring(ring)
    flags = spread(bits, n)
    shape, flags = flags.shape, flags.reshape(-1)
    # x xor y is x + y - 2 x y.
    own = ring.encode_int(flags)
    doubled = ring.scale(own, -2)
    product = _crossed(session, flags, doubled, ring, [MOVING])
    return ring.add(own, product).reshape(ring.storage(shape))


def weighted(session, bits, weights, ring, n):
    """A sum of secret bits with public weights, as a sum of two words.

    Rounds: 1. Transfers: 1 per bit.

    Parameters
    ----------
    session : PairSession
    bits : array of uint8, shape (k, ceil(n / 8))
    weights : sequence of int
        k of them; powers of two for a number by its bits.
    ring : {R32, R64, R128}
    n : int

    Returns
    -------
    part : array, shape ``ring.storage((n,))``
    """
    if len(weights) != len(bits):
        raise ValueError(f"{len(weights)} weights are not those of {len(bits)} bits")
    words = arithmetic(session, bits, ring, n)
    total = ring.zeros((n,))
    for word, weight in zip(words, weights, strict=True):
        total = ring.add(total, ring.scale(word, int(weight)))
    return total


def lifted(session, words, ring, bits, target):
    """Numbers of few bits in a larger ring, exactly.

    Rounds: 2 and the logarithm of `bits`, rounded up. Transfers: ``3 * bits - 1`` per
    number. `protocols.truncate_part` needs neither, for numbers that are far smaller
    than their ring.

    Parameters
    ----------
    session : PairSession
    words : array, shape ``ring.storage((n,))``
        this owner's part of signed numbers, modulo ``2**bits``.
    ring : {R32, R64, R128}
    bits : int
    target : {R64, R128}
        a ring of more bits.

    Returns
    -------
    part : array, shape ``target.storage((n,))``
    """
    _check_ring(ring)
    _check_ring(target)
    if not 0 < bits <= ring.bits or bits >= target.bits:
        raise ValueError(f"{bits} bits of {ring!r} do not become more in {target!r}")
    half = 1 << bits - 1
    if session.pid == MOVING:
        words = ring.add(words, protocols.constant(ring, half, words))
    mine = words_sliced(words, ring, bits)
    n = len(ring.flat(words))
    carry = arithmetic(session, _carry(session, mine), target, n)
    rows = np.zeros((n, target.nbytes), np.uint8)
    whole = 8 * width(bits)
    padded = np.zeros((whole, mine.shape[1]), np.uint8)
    padded[:bits] = mine
    rows[:, : width(bits)] = gathered(padded, n)
    total = rows.view(target.dtype).reshape(carry.shape)
    if session.pid == MOVING:
        total = target.sub(total, protocols.constant(target, half, total))
    return target.sub(total, target.scale(carry, 1 << bits))


def times(session, bits, words, ring):
    """Products of secret bits and words.

    Rounds: 1. Transfers: 2 per product.

    Parameters
    ----------
    session : PairSession
    bits : array of uint8, shape (..., ceil(n / 8))
    words : array, shape ``ring.storage((..., n))``
        this owner's part.
    ring : {R32, R64, R128}

    Returns
    -------
    part : array like `words`
    """
    _check_ring(ring)
    n = words.shape[-1] if ring.words == 1 else words.shape[-2]
    flags = spread(bits, n)
    if ring.storage(flags.shape) != words.shape:
        raise ValueError(
            f"bits of shape {flags.shape} are no factors of words of shape "
            f"{words.shape}"
        )
    flags = flags.reshape(-1)
    flat = np.ascontiguousarray(ring.flat(words))
    # Where this owner's bit is 1, the other's turns it off.
    turned = _signed(flat, flags, ring)
    part = _crossed(session, flags, turned, ring, [MOVING, STATIC])
    return ring.add(part, _where(flags, flat, ring)).reshape(words.shape)


def steps(session, words, ring, bits, thresholds, jumps, target, n):
    """A step function of secret numbers, as a sum of two words.

    Rounds: one more than `negative`. Transfers: ``3 * bits - 4`` per number and step.

    Parameters
    ----------
    session : PairSession
    words : array, shape ``ring.storage((n,))``
        this owner's part of signed numbers of `bits` bits.
    ring : Ring
    bits : int
    thresholds, jumps : sequence of int
        by how much the function grows at each threshold.
    target : {R32, R64, R128}
        ring of the result.
    n : int

    Returns
    -------
    part : array, shape ``target.storage((n,))``
        of the sum of the jumps at thresholds that a number reaches.
    """
    rows = np.stack([words] * len(thresholds))
    if session.pid == MOVING:
        for k, threshold in enumerate(thresholds):
            less = ring.from_ints(int(threshold))
            less = np.broadcast_to(less, words.shape)
            rows[k] = ring.sub(words, np.ascontiguousarray(less))
    padded = 8 * width(n)
    wide = ring.zeros((len(thresholds), padded))
    wide[:, :n] = rows
    below = negative(session, ring.flat(wide), ring, bits)
    reached = complement(session, below).reshape(len(thresholds), -1)
    return weighted(session, reached, jumps, target, n)
