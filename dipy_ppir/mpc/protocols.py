"""The protocols: input, degree reduction, truncation. Opening is in `Session`.

Three parties, threshold one. A secret x is shared by a line f with f(0) = x;
party i holds f(i + 1). Products of shares are values of a parabola; any three
points recombine it with the coefficients 3, -3, 1.

==================  ======  =========================  =======================
protocol            rounds  elements on all links      what a party sees
==================  ======  =========================  =======================
`share`             1       1 per value                one uniform element
`reduce`            1       3 per value                uniform elements
`between_owners`    1       1 per value                a uniform element
`truncate`          2       3 per value                uniform elements
`truncate_unseen`   2       2 per value                uniform elements
`deal`              1       1 per value                uniform numbers
`swap`              1       2 per value                as many as are masked
`Session.open`      1       2 (degree 2) or 1          the value, if receiver
                            (degree 1) per receiver
==================  ======  =========================  =======================

Why this is safe against one curious party: whatever it receives before an
opening is a point of a random line through a secret (uniform, because the line
has a random slope) or a secret plus a sharing of zero it does not know; both
can be produced by a simulator that has only the party's own input and outputs.
"""

import math
import secrets

import numpy as np

from dipy_ppir.mpc.arrays import SharedArray
from dipy_ppir.mpc.errors import FixedPointOverflowError, ProtocolError
from dipy_ppir.mpc.fields import P61, P127, R32, R64, R128
from dipy_ppir.mpc.ledger import HELPER, MOVING, ROLES, STATIC
from dipy_ppir.mpc.prg import Stream

# An owner's line is fixed by the point of one party, which that party derives
# from the seed it shares with the owner; the other party is sent its point.
SEED_PARTY = {0: 1, 1: 0, 2: 0}
SENT_PARTY = {0: 2, 1: 2, 2: 1}
#: Rings in which two owners alone hold what three parties hold in a field.
RINGS = {P61: R64, P127: R128}


def _point(field, owner, party, x, r):
    """Value at `party` of the line through x at 0 and r at the seed party."""
    s, j = SEED_PARTY[owner] + 1, party + 1
    inverse = field.inverse(s)
    return field.axpby((s - j) * inverse, x, j * inverse, r)


def share_elements(session, owner, x, shape, field, name):
    """Share field elements known to `owner`.

    Parameters
    ----------
    session : Session
        this party's session.
    owner : int
        party that knows the elements.
    x : array of uint64 or None
        packed elements, at the owner only.
    shape : tuple of int
        public shape.
    field : Field
        the field.
    name : str
        the protocol step, for the frames.

    Returns
    -------
    share : array of uint64
        this party's share. One element per value is sent, to one party.
    """
    if session.pid == owner:
        r = session.random_elements(SEED_PARTY[owner], owner, field, shape)
        session.network.send(
            SENT_PARTY[owner], name, _point(field, owner, SENT_PARTY[owner], x, r)
        )
        return _point(field, owner, owner, x, r)
    if session.pid == SEED_PARTY[owner]:
        return session.random_elements(owner, owner, field, shape)
    return session.receive_elements(owner, field, shape, name)


def in_parts(numbers, bound):
    """Integers that are the sum of what the parties give; local.

    Parameters
    ----------
    numbers : array
        zeros where a party has nothing to add.
    bound : int
        on the magnitude of the sum.

    Returns
    -------
    array : SharedArray, field R64
        whoever it is opened to learns the sum, see `Session.open`.
    """
    words = R64.encode_int(np.asarray(numbers).astype(np.int64))
    return SharedArray(R64, words, 2, 0, bound)


def share(session, owner, x, shape, *, frac_bits=0, bound=1.0, field=P61, name="share"):
    """Share real numbers known to one party as fixed-point numbers.

    Rounds: 1. Elements: 1 per value, to one party. Of two owners, alone or with a
    helper that dealt ahead, the one that knows the numbers holds them and the others
    zeros, in a ring: nothing is sent.

    Parameters
    ----------
    session : Session
        this party's session.
    owner : int
        party that knows `x`.
    x : array of float or None
        the numbers, at the owner only.
    shape : tuple of int
        public shape of `x`.
    frac_bits : int
        fraction bits kept; the numbers are rounded to nearest.
    bound : float
        public bound on the magnitude of every number.
    field : Field
        field of the shares.
    name : str
        the protocol step.

    Returns
    -------
    array : SharedArray
    """
    elements, alone = None, HELPER not in session.roles or session.ahead
    field = RINGS.get(field, field) if alone else field
    if session.pid == owner:
        x = np.asarray(x, dtype=np.float64)
        if x.shape != tuple(shape):
            raise ValueError(f"expected an array of shape {shape}, got {x.shape}")
        elements = field.encode(x, frac_bits, bound)
    integer_bound = int(np.ceil(bound * 2.0**frac_bits))
    if alone:
        part = field.zeros(shape) if elements is None else elements
        return SharedArray(field, part, 2, frac_bits, integer_bound)
    part = share_elements(session, owner, elements, shape, field, name)
    return SharedArray(field, part, 1, frac_bits, integer_bound)


def zero_share(session, field, shape):
    """This party's share of a random degree-2 sharing of zero; no messages.

    Each pair of parties draws one uniform element per value from its common
    seed; one adds it, the other subtracts it (in additive form), so the three
    additive parts sum to zero and any two of them are uniform.
    """
    after, before = (session.pid + 1) % 3, (session.pid + 2) % 3
    part = field.sub(
        session.zero_elements(after, field, shape),
        session.zero_elements(before, field, shape),
    )
    return field.scale(part, field.inverse(field.weights[session.pid]))


def additive_part(session, array):
    """This party's additive part of a degree-2 array (its Lagrange term)."""
    return array.field.scale(array.share, array.field.weights[session.pid])


def reshare_parts(session, parts, shape, field, *, frac_bits, bound, name):
    """Share of degree 1 of a sum whose terms are known to different parties.

    Rounds: 1. Elements: 1 per value and party in `parts`.

    Parameters
    ----------
    parts : dict
        maps each party that knows a term to that term (packed elements) at that
        party, to None elsewhere.
    bound : int
        bound on the magnitude of the sum.
    """
    total = None
    # Send first, then wait: no party waits for one that has yet to compute.
    order = sorted(parts, key=lambda owner: owner != session.pid)
    for owner in order:
        term = share_elements(
            session, owner, parts[owner], shape, field, f"{name}-{owner}"
        )
        total = term if total is None else field.add(total, term)
    return SharedArray(field, total, 1, frac_bits, bound)


def reduce(session, array, name="reduce"):
    """Bring a degree-2 array back to degree 1, exactly.

    Every party shares its own additive part; the sum of the three sharings is
    the result (Gennaro, Rabin and Rabin 1998).

    Rounds: 1. Elements: 3 per value. Each party sees one fresh uniform point of
    every other party's line.
    """
    part = additive_part(session, array)
    parts = {p: part if p == session.pid else None for p in range(3)}
    return reshare_parts(
        session,
        parts,
        array.shape,
        array.field,
        frac_bits=array.frac_bits,
        bound=array.bound,
        name=name,
    )


def drawn(session, peer, purpose, shape, dtype, out=None):
    """Uniform numbers that this party and a peer both draw; zeros without protection.

    Parameters
    ----------
    session : Session
    peer : int
    purpose : str
        every purpose has a stream of its own.
    shape, dtype
    out : array, optional
        where to put them.
    """
    out = np.empty(shape, dtype=dtype) if out is None else out
    if session.threshold:
        session.stream(peer, purpose.encode()).fill(out)
    else:
        out[...] = 0
    return out


def pad(session, name, shape, dtype=np.uint64, plus=np.add):
    """Uniform numbers that the helper knows and the owners hold parts of.

    No messages.

    Parameters
    ----------
    session : Session
    name : str
        what they are for; every name has streams of its own.
    shape : tuple of int
    dtype : dtype, optional
        unsigned integers.
    plus : callable, optional
        how parts are put together: `np.add`, `np.bitwise_xor`, or the addition of a
        ring whose elements have more than one word.

    Returns
    -------
    numbers : array of dtype
        this owner's part; at the helper the numbers themselves.
    """
    purpose = "pad-" + name
    if session.pid == HELPER:
        parts = (drawn(session, p, purpose, shape, dtype) for p in (MOVING, STATIC))
        return plus(*parts)
    return drawn(session, HELPER, purpose, shape, dtype)


def deal(session, name, numbers, shape, dtype=np.uint64, minus=np.subtract, out=None):
    """Share numbers that the helper knows between the owners.

    The moving owner's part comes from the seed it shares with the helper; the static
    owner is sent what is left.

    Rounds: 1. Elements: 1 per value. The static owner sees uniform numbers.

    Parameters
    ----------
    session : Session
    name : str
        what they are for; every name has a stream of its own.
    numbers : array of dtype
        at the helper only.
    shape, dtype
        of the numbers, as for `pad`.
    minus : callable, optional
        how a part is taken off.
    out : array, optional
        where to put the part.

    Returns
    -------
    part : array of dtype
        this owner's part; at the helper None.
    """
    purpose = "dealt-" + name
    if session.pid == MOVING:
        return drawn(session, HELPER, purpose, shape, dtype, out)
    if session.pid == HELPER:
        rest = minus(numbers, drawn(session, MOVING, purpose, shape, dtype))
        session.network.send(STATIC, name, rest)
        return None
    part = np.empty(shape, dtype=dtype) if out is None else out
    session.network.receive(HELPER, name, part)
    return part


def swap(session, name, mine):
    """Send the other owner an array, to receive its own; for owners.

    Rounds: 1. Whoever hides a part by its own part of a `pad` sends uniform numbers.

    Returns
    -------
    receive : callable
        returns what the other owner sent.
    """
    other = MOVING + STATIC - session.pid
    session.network.send(other, name, mine)

    def receive():
        theirs = np.empty_like(mine)
        session.network.receive(other, name, theirs)
        return theirs

    return receive


#: A truncation goes wrong with probability below 2**-SECURITY per value.
SECURITY = 40


def between_owners(session, array, name="owners"):
    """Bring an array to one additive part of each owner.

    The helper sends its part, hidden by a sharing of zero, to the moving owner.

    Rounds: 1. Elements: 1 per value. The moving owner sees a uniform element.

    Returns
    -------
    part : array of uint64
        this owner's part; at the helper zeros.
    """
    field, shape = array.field, array.shape
    weight = field.weights[session.pid]
    part = additive_part(session, array)
    part = field.add(part, field.scale(zero_share(session, field, shape), weight))
    if session.pid == HELPER:
        session.network.send(MOVING, name, part)
        return field.zeros(shape)
    if session.pid == MOVING:
        part = field.add(part, session.receive_elements(HELPER, field, shape, name))
    return part


def truncate_between_owners(session, array, bits, *, field=None, name="truncate"):
    """Drop low bits and change the field; the owners hold the result's parts.

    With the parts u and -w of `between_owners`, ``u - w = x + offset`` as integers
    unless a wrap occurs, so each owner shifts its own integer. The result is
    ``floor(x / 2**bits)`` or that plus one.

    Rounds: 1. Elements: 1 of the source field per value.

    Parameters
    ----------
    session : Session
    array : SharedArray
    bits : int
        low bits to drop; they come off `frac_bits`.
    field : Field, optional
        target field or ring; the source field by default.

    Returns
    -------
    part : array of uint64
        this owner's additive part in the target field; at the helper zeros.

    Raises
    ------
    FixedPointOverflowError
        if the array's bound is 2**(field bits - 41) or more: a wrap, which would
        change the result by p, must stay rarer than 2**-40 per value.
    """
    source, target = array.field, field or array.field
    check_truncation(source, array.bound, bits)
    part = between_owners(session, array, name)
    if session.pid == HELPER:
        return target.zeros(array.shape)
    return truncate_part(session.pid, source, part, array.bound, bits, target)


def check_truncation(source, bound, bits):
    """Raise FixedPointOverflowError if a truncation could go wrong too often."""
    if bound + _offset(bound, bits) > 1 << (source.bits - SECURITY):
        raise FixedPointOverflowError(
            f"truncating values of {bound.bit_length()} bits in {source!r} "
            f"could go wrong more often than once in 2^{SECURITY}; use the larger "
            "field or fewer fraction bits"
        )


def _offset(bound, bits):
    return 1 << max(bound.bit_length(), bits)


def truncate_part(pid, source, part, bound, bits, target, out=None):
    """One owner's part of a sum without its low bits; local.

    Parameters
    ----------
    pid : int
        this owner.
    source, target : Field
        field or ring of the parts, before and after.
    part : array of uint64
        this owner's additive part.
    bound : int
        bound on the magnitude of the sum.
    bits : int
        low bits to drop.
    out : array, optional
        where to put the result; may be `part`. In the ring of 128 bits only.
    """
    if source is R128 and target is R128:
        out = np.empty_like(part) if out is None else out
        offset, minus = _offset(bound, bits), pid != MOVING
        R128.kernels.shift(R128.flat(part), offset, bits, minus, R128.flat(out))
        return out
    if pid == MOVING:
        offset = _offset(bound, bits)
        u = source.add(part, constant(source, offset, part))
        u = shift_right(source, u, bits, target)
        return target.sub(u, constant(target, offset >> bits, u))
    return target.neg(shift_right(source, source.neg(part), bits, target))


def constant(field, integer, like):
    """The same integer in every place, for elements of the shape of `like`."""
    words = np.broadcast_to(field.from_ints(integer), like.shape)
    return np.ascontiguousarray(words)


def truncate(session, array, bits, *, field=None, name="truncate"):
    """Reduce the degree, drop low bits and change the field in one step.

    `truncate_between_owners`, and each owner shares its part.

    Rounds: 2. Elements: 1 of the source and 2 of the target field per value.
    The moving owner sees a uniform element; everyone sees fresh points.

    Parameters
    ----------
    session : Session
    array : SharedArray
        of degree 1 or 2.
    bits, field
        as for `truncate_between_owners`.

    Returns
    -------
    array : SharedArray, degree 1
    """
    target = field or array.field
    part = truncate_between_owners(session, array, bits, field=target, name=name)
    return _share_parts(session, array, part, bits, target, name + "-share")


def _share_parts(session, array, part, bits, target, name):
    return reshare_parts(
        session,
        {p: part if p == session.pid else None for p in (MOVING, STATIC)},
        array.shape,
        target,
        frac_bits=array.frac_bits - bits,
        bound=(array.bound >> bits) + 1,
        name=name,
    )


def share_owners(session, array, bits, field, name="owners-share"):
    """`truncate` an array whose parts the owners hold already, the helper's being zero.

    Rounds: 1. Elements: 2 of the target field per value.

    Returns
    -------
    array : SharedArray, degree 1
    """
    check_truncation(array.field, array.bound, bits)
    part = None
    if session.pid != HELPER:
        part = truncate_part(
            session.pid, array.field, array.share, array.bound, bits, field
        )
    return _share_parts(session, array, part, bits, field, name)


def confined(session, array, bits, field, name, drop=0):
    """Numbers in a field that are in a range whatever they were.

    Where they are below ``2**bits`` they are the same, but for digits that are dropped;
    else others, as small. Nobody need promise anything: through the rings of 64 and 128
    bits, where masks hide any number, whatever comes out is below the result's bound.

    Rounds: 2. Elements: those of `lift` and of `share_owners`.

    Parameters
    ----------
    session : Session
    array : SharedArray, shape (n,), field R64
        whose parts the owners hold.
    bits : int
    field : Field
        of the result.
    name : str
    drop : int, optional
        low bits to drop.

    Returns
    -------
    array : SharedArray, degree 1
    """
    shift = 61 - bits
    raised = array.times(1 << shift)
    raised.bound = (1 << 61) - 1
    whole = share_owners(session, lift(session, raised), shift + drop, field, name)
    # What is lifted is below 2**65 in any case.
    bound = 1 << 65 - shift - drop
    return SharedArray(field, whole.share, 1, array.frac_bits, bound)


def lift(session, array):
    r"""Bring numbers from a ring of 32 or 64 bits into that of 128, exactly.

    The owners open :math:`c = v + r` modulo 2**k to each other, r a mask of the
    helper's. With :math:`0 \le v < 2^{k - 2}`, c has wrapped around just where it is
    below 2**(k - 2) and r is not below 3 * 2**(k - 2); so :math:`v = c - r'`, where the
    helper deals r' for either case, r or r less 2**k.

    Rounds: 1. Bytes per number: 32 dealt by the helper, which runs ahead, and 4 words
    of the ring. What an owner receives is hidden by the other's part of r, or dealt.

    Parameters
    ----------
    session : Session
    array : SharedArray, shape (n,), field R32 or R64
        of magnitude below 2**(k - 3).

    Returns
    -------
    array : SharedArray, field R128
        the helper's part is zero.

    Raises
    ------
    FixedPointOverflowError
        if the array's bound is larger.
    """
    ring, quarter = array.field, array.field.modulus >> 2
    if array.bound >= quarter >> 1:
        raise FixedPointOverflowError(
            f"numbers of {array.bound.bit_length()} bits are too large to be lifted"
        )
    n, word = len(array.share), ring.dtype
    mask = pad(session, "lift", (n,), word)
    dealt = None
    if session.pid == HELPER:
        whole = _widened(mask)
        turns = np.outer(mask >= word(3 * quarter), np.ones(2)).astype(np.uint64)
        less = R128.sub(whole, turns * constant(R128, ring.modulus, whole))
        dealt = np.stack([less, whole])

    def take():
        return deal(session, "lifts", dealt, (2, n, 2), minus=R128.sub)

    receive, dealt = with_dealt(
        session, take, lambda: open_masked(session, array, mask, "lifted")
    )
    masked = receive() + word(quarter >> 1)
    part = R128.zeros((n,))
    if session.pid != HELPER:
        small = masked < word(quarter)
        part = R128.neg(np.where(small[:, None], *dealt))
    if session.pid == MOVING:
        part = R128.add(part, _widened(masked))
        part = R128.sub(part, constant(R128, quarter >> 1, part))
    return SharedArray(R128, part, 2, array.frac_bits, array.bound)


def _widened(words):
    """Words as elements of the ring of 128 bits."""
    words = words.astype(np.uint64)
    return np.stack([words, np.zeros_like(words)], axis=-1)


def with_dealt(session, deal_all, begin):
    """Deal ahead: the helper before it takes part, the owners after they have begun.

    Returns
    -------
    begun, dealt
        what the two functions returned.
    """
    if session.pid == HELPER:
        dealt = deal_all()
        return begin(), dealt
    begun = begin()
    return begun, deal_all()


def open_masked(session, array, mask, name):
    """Open numbers to both owners behind a mask that the helper knows.

    Every party's part is hidden: an owner's by its part of the mask, the helper's by a
    sharing of zero. Rounds: 1. Elements: 4 per number.

    Parameters
    ----------
    session : Session
    array : SharedArray, of degree 2 in a ring
    mask : array
        an owner's part of the mask, see `pad`; not used at the helper.
    name : str
        the protocol step.

    Returns
    -------
    receive : callable
        returns the masked numbers, the same at both owners; at the helper zeros.
    """
    ring, mine = array.field, array.share
    if session.pid != HELPER:
        mine = ring.add(mine, mask)
    owners = MOVING, STATIC
    hidden = {o: ring.add(mine, zero_share(session, ring, array.shape)) for o in owners}
    for owner in owners:
        if owner != session.pid:
            session.network.send(owner, name, hidden[owner])

    def receive():
        if session.pid == HELPER:
            return ring.zeros(array.shape)
        theirs = {p: array.empty() for p in ROLES if p != session.pid}
        session.network.receive_all(theirs, name)
        total = hidden[session.pid]
        for part in theirs.values():
            total = ring.add(total, part)
        return total

    return receive


def truncate_unseen(session, array, bits, *, field, name="truncate"):
    """Drop low bits, rounded in a way that the moving owner cannot foresee.

    Whoever holds a part that is shifted knows from which fraction on its sum is rounded
    up. Who then sees a function of the result, several times, learns the fractions.
    Here the helper and the static owner shift: the moving owner hides its part from the
    helper by s, which the static owner adds; those two hide how they are to round from
    the moving owner by z; and the helper hides its part of the result from the static
    owner by m, which is the moving owner's part.

    Rounds: 2; the moving owner does not wait. Elements: 1 of the source and 1 of the
    target field per value. The helper and the static owner see uniform elements.

    Parameters
    ----------
    session : Session
    array : SharedArray
        whose parts the owners hold; the helper's is zero.
    bits : int
        low bits to drop; they come off `frac_bits`.
    field : Field
        target field.
    name : str
        the protocol step.

    Returns
    -------
    receive : callable
        returns the SharedArray, whose parts the owners hold. It is right to one unit
        in the last place, but for a probability below 2**-40.

    Raises
    ------
    FixedPointOverflowError
        see `truncate_between_owners`.
    """
    source, target, bound = array.field, field, array.bound
    if {source, target} - {R64, R128}:
        raise ValueError("masks here are whole words: use the rings")
    check_truncation(source, bound, bits)

    def masks(peer, what, field):
        purpose = f"unseen-{name}-{what}"
        return drawn(session, peer, purpose, field.storage(array.shape), np.uint64)

    result = SharedArray(
        target,
        target.zeros(array.shape),
        2,
        array.frac_bits - bits,
        (bound >> bits) + 1,
    )
    if session.pid == MOVING:
        hidden = source.sub(array.share, masks(STATIC, "moved", source))
        session.network.send(HELPER, name, hidden)
        mine = masks(HELPER, "result", target)
        return lambda: result._with(mine)
    if session.pid == HELPER:
        part = session.receive_elements(MOVING, source, array.shape, name)
        part = source.add(part, masks(STATIC, "rounding", source))
        part = truncate_part(MOVING, source, part, bound, bits, target)
        session.network.send(
            STATIC, name, target.sub(part, masks(MOVING, "result", target))
        )
        return lambda: result
    part = source.add(array.share, masks(MOVING, "moved", source))
    part = source.sub(part, masks(HELPER, "rounding", source))
    mine = truncate_part(STATIC, source, part, bound, bits, target)

    def receive():
        theirs = session.receive_elements(HELPER, target, array.shape, name)
        return result._with(target.add(mine, theirs))

    return receive


def shift_right(source, a, bits, target):
    """Elements as integers in [0, p), shifted, as elements of `target`."""
    if source.words == 1:
        low, high = a >> np.uint64(bits), np.zeros_like(a)
    else:
        low, high = a[..., 0], a[..., 1]
        if bits >= 64:
            low, high = high >> np.uint64(bits - 64), np.zeros_like(high)
        elif bits:
            low = low >> np.uint64(bits) | high << np.uint64(64 - bits)
            high = high >> np.uint64(bits)
    if target.words == 2:
        return np.ascontiguousarray(np.stack([low, high], axis=-1))
    if target in (R32, R64):
        return low.astype(target.dtype, order="C")
    # 2**64 = 8 modulo 2**61 - 1, and times 8 is a rotation of 61 bits.
    p = np.uint64(target.modulus)
    high = high % p
    high = (high << np.uint64(3) | high >> np.uint64(58)) & p
    return np.ascontiguousarray((low % p + high) % p)


def dither(session, array, magnitude, by=STATIC):
    """Blur an array about to be opened by up to `magnitude` units, either way.

    A party that will not see it adds a secret uniform integer to each of its parts.
    What is opened then has no more digits than it is good for: exact sums of integers
    say more than the number they stand for. Local.

    Parameters
    ----------
    array : SharedArray
        of degree 2.
    magnitude : int
        in units of the last place.
    by : int, optional
        the party that adds them.
    """
    if magnitude < 1:
        return array
    bits = math.log2(2 * magnitude + 1)
    if session.pid != by:
        return array._with(array.share, noise_bits=bits)
    field = array.field
    count = int(np.prod(array.shape))
    noise = [secrets.randbelow(2 * magnitude + 1) - magnitude for _ in range(count)]
    noise = field.from_ints(noise).reshape(array.share.shape)
    noise = field.scale(noise, field.inverse(field.weights[by]))
    return array._with(field.add(array.share, noise), noise_bits=bits)


def blur(session, array, bits, by):
    """Bury the low bits of an array about to be opened.

    A party that will not see it adds secret uniform numbers of that size, with mean
    zero; see `dither`, which is for few values. Local.

    Parameters
    ----------
    array : SharedArray
        of degree 2, in a ring.
    bits : int
        above 63 in the ring of 128 bits, below 64 in that of 64.
    by : int
        the party that adds them.
    """
    if session.pid != by:
        return array._with(array.share, noise_bits=bits)
    field = array.field
    noise = Stream(secrets.token_bytes(32)).words(array.share.shape)
    top = noise if field.words == 1 else noise[..., 1]
    top &= np.uint64((1 << bits % 64) - 1)
    noise = field.sub(noise, constant(field, 1 << bits - 1, noise))
    return array._with(field.add(array.share, noise), noise_bits=bits)


def check_elements(field, elements, link_name, peer):
    """Refuse anything from a peer that is not an element of the field."""
    if not field.is_canonical(elements):
        raise ProtocolError(f"{link_name} sent a number outside {field!r}", peer)
