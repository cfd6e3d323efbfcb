r"""The highest one of a masked number, and the number scaled by it.

A number v, 0 < v < 2**62, is a sum of the three parties' words of 64 bits; those of 32
bits are treated alike, with 32 wherever it says 64. The helper deals
(`protocols.deal`) a uniform word r, of which the owners hold parts, and the owners
open :math:`c = v + r` modulo 2**64 to each other. From then on they know c, the
helper knows r, and of anything that depends on one bit of r or on few bits of a
mask the helper deals shares, or a table of shares for every value that the owners
may look up.

**Position.** For 0 <= k <= 62 let :math:`N_k` be bits k to 62 of c less those of r,
as a number of 63 - k bits: v shifted right by k, or that plus one. From k to k - 1

.. math:: N_{k-1} = 2 N_k + c_{k-1} - r_{k-1},

it starts at 0 or 1 and ends, one step after k = 0, at 2v. So there is one k where
:math:`N_k = 1` and :math:`N_{k-1} > 1`; there

.. math:: \tfrac12 \le 2^{-k} v < 2,

so that k is the position of v's highest one, or that plus one. For that k, and no
other, bits k to 62 of r are those of :math:`c - 2^k`, and bit k - 1 of r is 0 unless
that of c is 1: as many bits as differ from that are counted, with parts modulo 256
of the bits of r. Each of the 63 counts is opened behind a mask m; the dealt word
:math:`2^m` has a one at the number opened just where the count is 0. As its parts
are to be combined by exclusive or, so are those of k.

**Scale.** k is opened behind a mask of its own and looks up :math:`s = 2^{63-k}` and
:math:`r s` in dealt tables, so that the owners hold :math:`v s = c s - r s`, between
2**62 and 2**64. Whatever else depends on k alone may be looked up with it.

=================  ======  =======================================================
step               rounds  bytes per number, on all links
=================  ======  =======================================================
`deal_masks`       1       63 + 63 * 8 + 2 * 64 * 8 + 6 * 16 = 1687, from the helper
`open_masked`      1       4 * 8
`position_of`      2       2 * 63 + 2
=================  ======  =======================================================

(31 + 31 * 4 + 2 * 32 * 4 + 5 * 16 = 491, 4 * 4 and 2 * 31 + 2 for words of 32 bits.)

What each party sees: the helper nothing. The static owner the helper's messages,
each of which is a dealt number less a part that only the moving owner and the helper
draw. Each owner the other's part of a number that is opened, plus a mask's part that
only the other and the helper draw. All of it is uniform and independent of the
secrets, so a simulator draws it at random; no mask serves twice.
"""

from typing import NamedTuple

import numpy as np

from dipy_ppir.mpc import protocols
from dipy_ppir.mpc.errors import FixedPointOverflowError
from dipy_ppir.mpc.fields import R64, R128, WordRing
from dipy_ppir.mpc.ledger import HELPER, MOVING
from dipy_ppir.mpc.protocols import deal, pad, swap


def number_bits(ring):
    """Numbers to be normalized have no more bits than this."""
    return ring.bits - 2


def positions(ring):
    """Positions that are tested: one more than a number has bits."""
    return ring.bits - 1


def _places(ring):
    return np.arange(positions(ring), dtype=ring.dtype)


class Masks(NamedTuple):
    """What is dealt for n numbers: an owner's parts; at the helper the masks alone.

    Attributes
    ----------
    ring : WordRing
        of the numbers.
    number : array of words, shape (n,)
        the mask r; at the helper only.
    bits : array of uint8, shape (n, positions)
        bits of r, modulo 256.
    count : array of uint8, shape (n, positions)
        masks of the counts, modulo 256.
    tests : array of words, shape (n, positions)
        words whose only one is at the count's mask, by exclusive or.
    position : array of uint8, shape (n,)
        mask of the position, by exclusive or.
    scales : array of words, shape (2, bits, n)
        ``s`` and ``r s`` for every masked position, in the ring.
    exponent : array of uint64, shape (bits of a position, n, 2)
        bits of the position's mask, in the ring of 128 bits.
    """

    ring: WordRing
    number: np.ndarray = None
    bits: np.ndarray = None
    count: np.ndarray = None
    tests: np.ndarray = None
    position: np.ndarray = None
    scales: np.ndarray = None
    exponent: np.ndarray = None


def deal_masks(session, n, ring=R64):
    """Deal what is needed to normalize n numbers.

    Rounds: 1. It depends on nothing secret: the helper runs ahead, and calls this
    before `open_masked`.

    Parameters
    ----------
    session : Session
    n : int
    ring : WordRing, optional

    Returns
    -------
    masks : Masks
    """
    tall, bits_of_position = (n, positions(ring)), ring.bits.bit_length() - 1
    count = pad(session, "count", tall, np.uint8)
    position = pad(session, "position", (n,), np.uint8, np.bitwise_xor)
    bits = tests = scales = exponent = None
    if session.pid == HELPER:
        number = _mask(session, n, ring)
        bits = (number[:, None] >> _places(ring) & ring.dtype(1)).astype(np.uint8)
        tests = ring.dtype(1) << (count & np.uint8(ring.bits - 1)).astype(ring.dtype)
        scales = _scales(number, _unmasked(position, ring), ring)
        places = np.arange(bits_of_position, dtype=np.uint8)[:, None]
        exponent = R128.encode_int(position >> places & np.uint8(1))
    dealt = (
        deal(session, "bits", bits, tall, np.uint8),
        count,
        deal(session, "tests", tests, tall, ring.dtype, minus=np.bitwise_xor),
        position,
        deal(session, "scales", scales, (2, ring.bits, n), ring.dtype),
        deal(session, "exponent", exponent, (bits_of_position, n, 2), minus=R128.sub),
    )
    if session.pid == HELPER:
        return Masks(ring, number, position=position)
    return Masks(ring, None, *dealt)


def deal_function(session, position, ring, values):
    """Deal a function of the position of n numbers; see `look_up`.

    Rounds: 1. Bytes: 16 for every bit of a number's word.

    Parameters
    ----------
    session : Session
    position : array of uint8, shape (n,)
        `Masks.position` of the numbers.
    ring : WordRing
    values : sequence of int
        of the function, for every position, in the ring of 128 bits.

    Returns
    -------
    table : array of uint64, shape (bits, n, 2)
        at an owner; at the helper None.
    """
    table = None
    if session.pid == HELPER:
        table = R128.from_ints(values)[_unmasked(position, ring)]
    shape = (ring.bits, len(position), 2)
    return deal(session, "function", table, shape, minus=R128.sub)


def _unmasked(position, ring):
    """The positions that every masked one stands for."""
    every = np.arange(ring.bits, dtype=np.uint8)[:, None]
    return (every ^ position) & np.uint8(ring.bits - 1)


def _mask(session, n, ring):
    return pad(session, "number", (n,), ring.dtype)


def _scales(number, position, ring):
    exponent = np.uint8(ring.bits - 1) - position
    scale = ring.dtype(1) << exponent.astype(ring.dtype)
    return np.stack([scale, scale * number])


def open_masked(session, array):
    """Open a shared array to both owners, behind the mask that `deal_masks` is about.

    An owner sends its part at once, before it waits for what the helper deals.

    Rounds: 1. Bytes: 4 words per number.

    Parameters
    ----------
    session : Session
    array : SharedArray, shape (n,), in a ring of words

    Returns
    -------
    receive : callable
        returns the masked numbers, an array of words of shape (n,), the same at both
        owners; at the helper zeros. Owners call it after `deal_masks`.

    Raises
    ------
    FixedPointOverflowError
        if the array's bound is 2**number_bits or more.
    """
    ring = array.field
    if array.bound >> number_bits(ring):
        raise FixedPointOverflowError(
            f"numbers of {array.bound.bit_length()} bits are too large to be "
            f"normalized; they must have {number_bits(ring)} at most"
        )
    mask = None if session.pid == HELPER else _mask(session, len(array.share), ring)
    return protocols.open_masked(session, array, mask, "masked")


def position_of(session, masked, masks):
    """Position of the highest one of numbers, behind a mask, at the owners.

    Rounds: 2. Bytes: 2 for each position that is tested and 2, per number.

    Parameters
    ----------
    session : Session
    masked : array of words, shape (n,)
        what `open_masked` opened; the numbers are not zero.
    masks : Masks

    Returns
    -------
    position : array of uint8, shape (n,)
        the same at both owners.
    """
    ring = masks.ring
    last = np.uint8(ring.bits - 1)
    place = (masked[:, None] >> _places(ring) & ring.dtype(1)).astype(np.uint8)
    counts = _differing(session, place, masks.bits) + masks.count
    counts += swap(session, "counts", counts)()
    hits = masks.tests >> (counts & last).astype(ring.dtype) & ring.dtype(1)
    position = np.bitwise_xor.reduce(hits * _places(ring), axis=1).astype(np.uint8)
    position ^= masks.position
    return (position ^ swap(session, "position", position)()) & last


def scaled_by(masked, position, masks):
    """Part of the number times ``2**(bits - 1 - k)``, in its ring, at an owner."""
    scale, product = masks.scales[:, position, np.arange(len(masked))]
    return masked * scale - product


def exponent_of(session, position, masks):
    """Part of the position k of the highest one, or of that plus one, at an owner.

    Returns
    -------
    exponent : array of uint64, shape (n, 2)
        in the ring of 128 bits.
    """
    return _unmask_position(session, position, masks.exponent)


def look_up(position, table):
    """This owner's part of a function that `deal_function` dealt."""
    return np.ascontiguousarray(table[position, np.arange(len(position))])


def _differing(session, place, bits):
    """Parts of how many bits of r differ from those that position k would have.

    Parameters
    ----------
    place : array of uint8, shape (n, positions)
        bits of c, 0 or 1.
    bits : array of uint8, shape (n, positions)
        parts of the bits of r.
    """
    count = np.uint8(place.shape[1])
    one = np.uint8(session.pid == MOVING)  # a constant is added by one owner
    from_one = one - bits
    equal = _sums_from(np.where(place, from_one, bits))
    ones = _sums_from(from_one)
    # Taking off 2**k turns c's lowest one from k on, at j, into 0, those below to 1.
    j = np.where(place, np.arange(count, dtype=np.uint8), count)
    j = np.minimum.accumulate(j[:, ::-1], axis=1)[:, ::-1]
    at = np.zeros_like(ones)
    at[:, :-1] = equal[:, 1:] + bits - ones[:, :-1]
    counts = ones[:, :-1] + np.take_along_axis(at, j.astype(np.intp), axis=1)
    counts[:, 1:] += np.where(place[:, :-1], np.uint8(0), bits[:, :-1])
    return counts


def _sums_from(x):
    """Sums of each row from every place on, modulo 256; past the end 0."""
    sums = np.zeros((len(x), x.shape[1] + 1), dtype=np.uint8)
    np.cumsum(x[:, ::-1], axis=1, dtype=np.uint8, out=sums[:, -2::-1])
    return sums


def _unmask_position(session, position, bits):
    """Part of a number from its bits' exclusive or with dealt bits."""
    total = R128.zeros(position.shape)
    for b, part in enumerate(bits):
        bit = (position >> np.uint8(b) & np.uint8(1)).astype(np.int64)
        R128.addmul(total, part, R128.encode_int((1 - 2 * bit) << b))
    if session.pid == MOVING:
        total = R128.add(total, R128.encode_int(position))
    return total
