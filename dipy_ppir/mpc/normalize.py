r"""The highest one of a masked number, and the number scaled by it.

A number v, 0 < v < 2**62, is a sum of the three parties' words. The helper deals
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
2**62 and 2**64.

=================  ======  =======================================================
step               rounds  bytes per number, on all links
=================  ======  =======================================================
`deal_masks`       1       63 + 63 * 8 + 2 * 64 * 8 + 6 * 16 = 1687, from the helper
`open_masked`      1       4 * 8
`normalize`        2       2 * 63 + 2
=================  ======  =======================================================

What each party sees: the helper nothing. The static owner the helper's messages,
each of which is a dealt number less a part that only the moving owner and the helper
draw. Each owner the other's part of a number that is opened, plus a mask's part that
only the other and the helper draw. All of it is uniform and independent of the
secrets, so a simulator draws it at random; no mask serves twice.
"""

from typing import NamedTuple

import numpy as np

from dipy_ppir.mpc.errors import FixedPointOverflowError
from dipy_ppir.mpc.fields import R64, R128
from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC
from dipy_ppir.mpc.protocols import deal, pad, swap, zero_share

#: Numbers to be normalized are below 2**NUMBER_BITS.
NUMBER_BITS = 62
#: Positions that are tested: one more than a number has bits.
POSITIONS = NUMBER_BITS + 1
#: Bits of a position.
POSITION_BITS = 6

_PLACES = np.arange(POSITIONS, dtype=np.uint64)


class Masks(NamedTuple):
    """What is dealt for n numbers: an owner's parts; at the helper `number` alone.

    Attributes
    ----------
    number : array of uint64, shape (n,)
        the mask r; at the helper only.
    bits : array of uint8, shape (n, POSITIONS)
        bits of r, modulo 256.
    count : array of uint8, shape (n, POSITIONS)
        masks of the counts, modulo 256.
    tests : array of uint64, shape (n, POSITIONS)
        words whose only one is at the count's mask, by exclusive or.
    position : array of uint8, shape (n,)
        mask of the position, by exclusive or.
    scales : array of uint64, shape (2, 64, n)
        ``s`` and ``r s`` for every masked position, in the ring of 64 bits.
    exponent : array of uint64, shape (POSITION_BITS, n, 2)
        bits of the position's mask, in the ring of 128 bits.
    """

    number: np.ndarray = None
    bits: np.ndarray = None
    count: np.ndarray = None
    tests: np.ndarray = None
    position: np.ndarray = None
    scales: np.ndarray = None
    exponent: np.ndarray = None


def deal_masks(session, n):
    """Deal what `normalize` needs for n numbers.

    Rounds: 1. It depends on nothing secret: the helper runs ahead, and calls this
    before `open_masked`.

    Returns
    -------
    masks : Masks
    """
    tall = (n, POSITIONS)
    count = pad(session, "count", tall, np.uint8)
    position = pad(session, "position", (n,), np.uint8, np.bitwise_xor)
    bits = tests = scales = exponent = None
    if session.pid == HELPER:
        number = _mask(session, n)
        bits = (number[:, None] >> _PLACES & np.uint64(1)).astype(np.uint8)
        tests = np.uint64(1) << (count & np.uint8(63)).astype(np.uint64)
        scales = _scales(number, position)
        places = np.arange(POSITION_BITS, dtype=np.uint8)[:, None]
        exponent = R128.encode_int(position >> places & np.uint8(1))
    dealt = (
        deal(session, "bits", bits, tall, np.uint8),
        count,
        deal(session, "tests", tests, tall, minus=np.bitwise_xor),
        position,
        deal(session, "scales", scales, (2, 64, n)),
        deal(session, "exponent", exponent, (POSITION_BITS, n, 2), minus=R128.sub),
    )
    return Masks(number) if session.pid == HELPER else Masks(None, *dealt)


def _mask(session, n):
    return pad(session, "number", (n,))


def _scales(number, position):
    every = np.arange(64, dtype=np.uint8)[:, None]
    exponent = np.uint8(63) - ((every ^ position) & np.uint8(63))
    scale = np.uint64(1) << exponent.astype(np.uint64)
    return np.stack([scale, scale * number])


def open_masked(session, array):
    """Open a shared array to both owners, behind the mask that `deal_masks` is about.

    An owner sends its part at once, before it waits for what the helper deals.

    Rounds: 1. Bytes: 32 per number.

    Parameters
    ----------
    session : Session
    array : SharedArray, shape (n,), field R64

    Returns
    -------
    receive : callable
        returns the masked numbers, an array of uint64 of shape (n,), the same at both
        owners; at the helper zeros. Owners call it after `deal_masks`.

    Raises
    ------
    FixedPointOverflowError
        if the array's bound is 2**NUMBER_BITS or more.
    """
    if array.bound >> NUMBER_BITS:
        raise FixedPointOverflowError(
            f"numbers of {array.bound.bit_length()} bits are too large to be "
            f"normalized; they must have {NUMBER_BITS} at most"
        )
    mine = array.share
    if session.pid != HELPER:
        mine = mine + _mask(session, len(mine))
    hidden = {o: mine + zero_share(session, R64, array.shape) for o in (MOVING, STATIC)}
    for owner in hidden:
        if owner != session.pid:
            session.network.send(owner, "masked", hidden[owner])

    def receive():
        if session.pid == HELPER:
            return R64.zeros(array.shape)
        theirs = {p: array.empty() for p in session.peers}
        session.network.receive_all(theirs, "masked")
        return hidden[session.pid] + sum(theirs.values())

    return receive


def normalize(session, masked, masks):
    """Position of the highest one of numbers, and the numbers scaled by it.

    Rounds: 2. Bytes: 128 per number.

    Parameters
    ----------
    session : Session
    masked : array of uint64, shape (n,)
        what `open_masked` opened; the numbers are not zero.
    masks : Masks

    Returns
    -------
    exponent : array of uint64, shape (n, 2)
        this owner's part, in the ring of 128 bits, of the position k of each
        number's highest one, or of that plus one.
    scaled : array of uint64, shape (n,)
        its part of the number times ``2**(63 - k)``, in the ring of 64 bits.
    """
    n = len(masked)
    if session.pid == HELPER:
        return R128.zeros((n,)), R64.zeros((n,))
    place = (masked[:, None] >> _PLACES & np.uint64(1)).astype(np.uint8)
    counts = _differing(session, place, masks.bits) + masks.count
    counts += swap(session, "counts", counts)()
    hits = masks.tests >> (counts & np.uint8(63)).astype(np.uint64) & np.uint64(1)
    position = np.bitwise_xor.reduce(hits * _PLACES, axis=1).astype(np.uint8)
    position ^= masks.position
    position = (position ^ swap(session, "position", position)()) & np.uint8(63)
    scale, product = masks.scales[:, position, np.arange(n)]
    exponent = _unmask_position(session, position, masks.exponent)
    return exponent, masked * scale - product


def _differing(session, place, bits):
    """Parts of how many bits of r differ from those that position k would have.

    Parameters
    ----------
    place : array of uint8, shape (n, POSITIONS)
        bits of c, 0 or 1.
    bits : array of uint8, shape (n, POSITIONS)
        parts of the bits of r.
    """
    one = np.uint8(session.pid == MOVING)  # a constant is added by one owner
    from_one = one - bits
    equal = _sums_from(np.where(place, from_one, bits))
    ones = _sums_from(from_one)
    # Taking off 2**k turns c's lowest one from k on, at j, into 0, those below to 1.
    j = np.where(place, np.arange(POSITIONS, dtype=np.uint8), np.uint8(POSITIONS))
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
