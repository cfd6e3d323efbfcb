"""Words shared bit by bit between the two owners, the helper dealing.

A 64-bit word x is held as ``x = x_moving ^ x_static``; the helper holds
nothing. XOR, shifts and public constants are local. An AND of two words uses a
product of random words (a "triple") that the helper deals: the owners' halves
come from the seeds each shares with the helper, so that only one corrected word
travels from the helper; the owners then exchange their operands, hidden by the
random words.

AND: 1 round, 5 words per 64 gates (1 from the helper, which runs ahead, 2 each way
between the owners). Seen: the static owner one uniform word from the helper; each
owner two uniform words from the other. The helper receives nothing.
"""

import numpy as np

from dipy_ppir.mpc.ledger import HELPER, MOVING, STATIC


class Words:
    """Words shared bit by bit; at the helper an empty stand-in of that shape.

    Parameters
    ----------
    session : Session
    bits : array of uint64
        this owner's half; any array of that shape at the helper.
    """

    def __init__(self, session, bits):
        self.session = session
        self.bits = np.ascontiguousarray(bits, dtype=np.uint64)

    def _like(self, bits):
        return Words(self.session, bits)

    def __xor__(self, other):
        return self._like(self.bits ^ other.bits)

    def __lshift__(self, k):
        return self._like(self.bits << np.uint64(k))

    def __rshift__(self, k):
        return self._like(self.bits >> np.uint64(k))

    def flip(self, mask):
        """XOR with a public word."""
        if self.session.pid != MOVING:
            return self
        return self._like(self.bits ^ np.uint64(mask))

    def bit(self, i):
        """Bit i of each word, as a word of 0 or 1."""
        return self._like(self.bits >> np.uint64(i) & np.uint64(1))

    def spread(self):
        """Words of 0 or 1 as words of no or all ones."""
        return self._like(np.uint64(0) - self.bits)

    def parity(self, mask):
        """Parity of the bits selected by a public mask, as words of 0 or 1."""
        x = self.bits & np.uint64(mask)
        for k in (32, 16, 8, 4, 2, 1):
            x = x ^ x >> np.uint64(k)
        return self._like(x & np.uint64(1))

    def __and__(self, other):
        return and_all([(self, other)])[0]

    def __or__(self, other):
        return self ^ other ^ (self & other)


def and_all(pairs):
    """AND several pairs of shared words in one round.

    Parameters
    ----------
    pairs : list of (Words, Words)
        all of one shape.

    Returns
    -------
    products : list of Words
    """
    session = pairs[0][0].session
    x = np.stack([a.bits for a, _ in pairs])
    y = np.stack([b.bits for _, b in pairs])
    name = "and"
    if session.pid == HELPER:
        a0, b0, c0 = _random_words(session, MOVING, 3, x.shape)
        a1, b1 = _random_words(session, STATIC, 2, x.shape)
        session.network.send(STATIC, name, (a0 ^ a1) & (b0 ^ b1) ^ c0)
        return [p for p, _ in pairs]
    if session.pid == MOVING:
        a, b, c = _random_words(session, HELPER, 3, x.shape)
    else:
        a, b = _random_words(session, HELPER, 2, x.shape)
        c = np.empty_like(x)
        session.network.receive(HELPER, name, c)
    mine = np.stack([x ^ a, y ^ b])
    theirs = np.empty_like(mine)
    other = STATIC if session.pid == MOVING else MOVING
    session.network.send(other, name, mine)
    session.network.receive(other, name, theirs)
    d, e = mine ^ theirs
    z = c ^ d & b ^ e & a
    if session.pid == MOVING:
        z ^= d & e
    return [Words(session, row) for row in z]


def _random_words(session, peer, count, shape):
    if session.threshold == 0:
        return np.zeros((count, *shape), dtype=np.uint64)
    return session.stream(peer, b"boolean").words((count, *shape))


def add_words(session, first, second):
    """Bits of a sum of one 64-bit word of each owner.

    A parallel-prefix (Kogge-Stone) adder. 7 ANDs deep, 12 words of AND per number.

    Parameters
    ----------
    first, second : array of uint64, shape (n,)
        the moving owner's and the static owner's words, each at its owner;
        anything of that shape elsewhere.

    Returns
    -------
    total : Words, shape (n,)
        the sum modulo 2**64.
    wrapped : Words, shape (n,)
        1 where ``first + second >= 2**64``.
    """
    nothing = np.zeros_like(first)
    x = Words(session, first if session.pid == MOVING else nothing)
    y = Words(session, second if session.pid == STATIC else nothing)
    propagate = x ^ y
    carry, chain = x & y, propagate
    for k in (1, 2, 4, 8, 16):
        more, chain = and_all([(chain, carry << k), (chain, chain << k)])
        carry = carry ^ more
    carry = carry ^ (chain & carry << 32)
    return propagate ^ carry << 1, carry.bit(63)


def normalize(x):
    """Shift every word left until its highest one is bit 63.

    12 ANDs deep, 12 words of AND per number.

    Parameters
    ----------
    x : Words, shape (n,)
        not zero.

    Returns
    -------
    shifted : Words, shape (n,)
    exponent : list of 6 Words
        bits of the position of the highest one, lowest bit first, each 0 or 1.
    """
    filled = x
    for k in (1, 2, 4, 8, 16, 32):
        filled = filled | filled >> k
    highest = filled ^ filled >> 1
    exponent = []
    for j in range(6):
        mask = sum(1 << i for i in range(64) if i >> j & 1)
        exponent.append(highest.parity(mask))
    for j in range(6):
        # Shift by 2**j if bit j of 63 - position is set.
        move = exponent[j].flip(1).spread()
        x = x ^ (move & (x ^ x << (1 << j)))
    return x, exponent
