r"""Random oblivious transfers between two owners, made in batches ahead of their use.

In a transfer the *sender* gets two random pads of 128 bits, the *chooser* a random bit
and the pad of that number. The sender does not learn the bit, the chooser nothing of
the other pad. Of few transfers many are made (Ishai, Kilian, Nissim and Petrank 2003;
in a quarter of their bytes, with a check of what the chooser sends, by Roy 2022,
*SoftSpokenOT*). Sums here are modulo 2, unless stated otherwise.

1. Once for each direction the roles are turned round: the sender draws 128 bits s, and
   of each of 128 pairs of keys that the chooser knows it gets one, that of the other
   bit than :math:`s_j`. These base transfers are oblivious products: with that bit
   times a random :math:`d_j` in parts :math:`u_j + v_j` modulo 2**128, the keys are
   :math:`-v_j` and :math:`d_j - v_j`, and the sender's part is one of them.
2. Of each four pairs the chooser makes 16 seeds, the leaves of a binary tree of
   pseudorandom numbers (Goldreich, Goldwasser and Micali 1986). For each level below
   the first it sends the sums of the left and of the right nodes, hidden by the keys of
   a pair. So the sender can compute all leaves but the one of the number that its four
   bits of s make.
3. Each leaf gives a column :math:`r_x` of one bit for each transfer of a batch, x from
   0 to 15. The chooser has of every tree the sum :math:`u = \sum_x r_x` and, for each
   bit l of x, :math:`t_l = \sum_x x_l r_x`. The sender has
   :math:`\sum_x (x_l + s_l) r_x = t_l + s_l u`, in which the leaf that it has not got
   does not occur. The first tree's sum is the choices c; of the others the chooser
   sends :math:`u + c`, which the sender adds where :math:`s_l = 1`. Row i of its 128
   columns is then :math:`q_i = t_i + c_i s`.
4. The sender checks that c is the same in all trees: the chooser sends linear hashes of
   c and of each of its columns, for which :math:`G(q) = G(t) + s G(c)` must hold. G is
   a polynomial over the field of 2**128 elements (GHASH, McGrew and Viega 2004) at a
   point that follows from what the chooser sent, so that columns that differ have the
   same hash less than once in 2**110. The first `CHECKED` transfers hide c in G(c), and
   are thrown away.
5. The pads are :math:`H(q_i)` and :math:`H(q_i + s)`; the chooser has
   :math:`H(t_i)`, which is the one of them that it chose.

H is ``AES(x) + x`` with a public key that is drawn anew for each batch, so that each
has to be attacked on its own; it must be correlation robust (Guo, Katz, Wang and Yu
2020), as is assumed of it elsewhere (`steps`).

==========  ======  ==================================================================
step        rounds  bytes on the link
==========  ======  ==================================================================
base        1       128 * 16 + 3 * 32 * 32, and 128 products of
                    `session.multiplications`; once for each direction
batch       1       31 / 8 per transfer, and 2560; the first is of 2**12, each later
                    one of as many as all before, at most 2**18, or of what is asked
                    for
`products`  0       0; takes 8 transfers a byte
`pads`      0       0
==========  ======  ==================================================================

What each owner sees: in the base transfers the chooser gets a bit less a random factor
that only the sender knows, uniform modulo 2**128. What the sender gets is hidden by a
key, or by the column of a leaf, that it has not got: as good as uniform. G(c) is
uniform, too, by the transfers that are thrown away, and the other hashes follow from
it. A chooser whose trees do not agree must guess the four bits of s of each tree that
differs, or is found out: what it learns of s it had guessed.
"""

import hashlib
import secrets
from typing import NamedTuple

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
import numpy as np

from dipy_ppir.mpc import bitslices
from dipy_ppir.mpc.errors import ProtocolError
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.prg import Stream

#: Columns of a batch: bits of security. So many of them stand on one tree.
COLUMNS, DEPTH = 128, 4
_TREES, _LEAVES = COLUMNS // DEPTH, 1 << DEPTH
#: Public keys of the trees: left and right.
_KEYS = (bytes([5]) * 16, bytes([6]) * 16)
#: Bytes of a transfer that is made ahead.
BYTES = (_TREES - 1) / 8
#: Transfers of a batch that are made to be checked by.
CHECKED = 128
#: Transfers of a batch, at least and where no more are asked for.
SMALLEST, LARGEST = 1 << 12, 1 << 18


class Sent(NamedTuple):
    """The sender's side of n transfers.

    Attributes
    ----------
    first, second : array of uint64, shape (n, 2)
        the pads.
    """

    first: np.ndarray
    second: np.ndarray


class Chosen(NamedTuple):
    """The chooser's side of n transfers.

    Attributes
    ----------
    choices : array of bool, shape (n,)
    pad : array of uint64, shape (n, 2)
        the pads chosen.
    """

    choices: np.ndarray
    pad: np.ndarray


class _Direction:
    """The transfers of which one owner is the sender.

    Parameters
    ----------
    session : PairSession
    sender : int
    """

    def __init__(self, session, sender):
        self._session, self.sender = session, sender
        self._sends = session.pid == sender
        self._name = f"transfers-{sender}"
        self._hash_keys = session.stream(session.other, self._name.encode())
        self._streams = None
        self._secret = None
        self._pool = None
        self._made = 0

    @property
    def left(self):
        """Transfers in the pool."""
        return 0 if self._pool is None else len(self._pool[0])

    def take(self, n):
        """The next n transfers: `Sent` or `Chosen`."""
        # Of none too there is a batch, which says what their arrays are like.
        self.reserve(max(n, 1))
        taken = [part[:n] for part in self._pool]
        self._pool = [part[n:] for part in self._pool]
        return (Sent if self._sends else Chosen)(*taken)

    def reserve(self, n):
        """Make batches until there are n transfers in the pool.

        Rounds: 1, and 1 more the first time, if there are fewer.
        """
        # A copy of the process would use the same pads again.
        self._session.check_process()
        lacking = n - self.left
        if lacking <= 0:
            return
        if self._streams is None:
            self._begin()
        # Whoever used many will use as many again.
        lacking = max(lacking, min(max(self._made, SMALLEST), LARGEST))
        pieces = [] if self._pool is None else [self._pool]
        while lacking > 0:
            size = 8 * bitslices.width(min(lacking, LARGEST))
            pieces.append(self._batch(size))
            self._made += size
            lacking -= size
        self._pool = [np.concatenate(parts) for parts in zip(*pieces, strict=True)]

    def _begin(self):
        """The base transfers, and the trees that stand on them."""
        session = self._session
        factor, part = session.multiplications.take(COLUMNS)
        below = np.empty((DEPTH - 1, _TREES, 2, 2), dtype=np.uint64)
        if self._sends:
            self._secret = np.frombuffer(secrets.token_bytes(COLUMNS // 8), np.uint8)
            bits = bitslices.spread(self._secret, COLUMNS)
            words = R128.sub(R128.encode_int(~bits), factor)
            session.network.send(session.other, self._name, words)
            session.network.receive(session.other, self._name, below)
            path = bits.reshape(_TREES, DEPTH).astype(np.intp)
            leaves = _leaves_but(path, part.reshape(_TREES, DEPTH, 2), below)
            # By their numbers plus that of the missing one, which comes first.
            missing = (path << np.arange(DEPTH)).sum(axis=1)
            order = np.arange(_LEAVES) ^ missing[:, None]
            leaves = np.take_along_axis(leaves, order[..., None], axis=1)
        else:
            words = session.receive_elements(
                session.other, R128, (COLUMNS,), self._name
            )
            first = R128.neg(R128.add(R128.mul(words, factor), part))
            keys = np.stack([first, R128.add(factor, first)], axis=1)
            leaves = _leaves(keys.reshape(_TREES, DEPTH, 2, 2), below)
            session.network.send(session.other, self._name, below)
        self._streams = [[Stream(seed.tobytes()) for seed in tree] for tree in leaves]

    def _columns(self, size):
        """Columns of a batch, and the trees' sums; those at the chooser only.

        Returns
        -------
        columns : array of uint8, shape (trees, 4, size / 8)
        sums : array of uint8, shape (trees, size / 8)
        """
        columns = np.empty((_TREES, DEPTH, size // 8), dtype=np.uint8)
        sums = np.empty((_TREES, size // 8), dtype=np.uint8)
        rows = np.zeros((_LEAVES, size // 8), dtype=np.uint8)
        for streams, some, total in zip(self._streams, columns, sums, strict=True):
            # The sender has not got the first.
            for x in range(self._sends, _LEAVES):
                streams[x].fill(rows[x])
            for bit in reversed(range(DEPTH)):
                half = 1 << bit
                upper = rows[half : 2 * half]
                np.bitwise_xor.reduce(upper, axis=0, out=some[bit])
                rows[:half] ^= upper
            total[...] = rows[0]
        return columns, sums

    def _batch(self, size):
        """A batch of transfers, a multiple of 8; rounds: 1.

        Raises
        ------
        ProtocolError
            if the chooser does not choose alike in all columns.
        """
        session, name = self._session, self._name
        key = self._hash_keys.words(2).tobytes()
        columns, sums = self._columns(CHECKED + size)
        hashes = np.empty((1 + COLUMNS, 16), dtype=np.uint8)
        if self._sends:
            session.network.receive(session.other, name, sums[1:])
            bits = bitslices.spread(self._secret, COLUMNS).reshape(_TREES, DEPTH, 1)
            columns[1:] ^= sums[1:, None] * bits[1:]
            session.network.receive(session.other, name, hashes)
            found = _checked(key, sums[1:], columns.reshape(COLUMNS, -1))
            if (found != hashes[1:] ^ hashes[0] * bits.reshape(-1, 1)).any():
                who = session.name_of(session.other)
                raise ProtocolError(
                    f"{who} made transfers that do not belong together; it does not "
                    "follow the protocol, or runs another version",
                    session.other,
                )
        else:
            choices = sums[0]
            sums[1:] ^= choices
            session.network.send(session.other, name, sums[1:])
            every = np.concatenate([choices[None], columns.reshape(COLUMNS, -1)])
            hashes = _checked(key, sums[1:], every)
            session.network.send(session.other, name, hashes)
        columns, cipher = columns[..., CHECKED // 8 :], public_cipher(key)
        rows = _rows(columns, size)
        if self._sends:
            other = rows ^ self._secret.view(np.uint64)
            return [hashed(cipher, rows), hashed(cipher, other)]
        choices = bitslices.spread(choices[CHECKED // 8 :], size)
        return [choices, hashed(cipher, rows)]


def _checked(key, sent, columns):
    """Linear hashes of columns, by a key that follows from what was sent.

    Parameters
    ----------
    key : bytes
        of the batch.
    sent : array of uint8
        what the chooser cannot change any more.
    columns : array of uint8, shape (n, bytes)

    Returns
    -------
    hashes : array of uint8, shape (n, 16)
    """
    point = hashlib.sha256(b"transfers" + key + sent.tobytes()).digest()[:16]
    cipher, nonce = AESGCM(point), bytes(12)
    # A tag is the hash and what is the same for all of a length.
    tags = [
        cipher.encrypt(nonce, b"", column.tobytes())
        for column in (np.zeros_like(columns[0]), *columns)
    ]
    tags = np.frombuffer(b"".join(tags), np.uint8).reshape(-1, 16)
    return tags[1:] ^ tags[0]


def _leaves(keys, below):
    """The leaves of all trees, of all keys of the base transfers.

    Parameters
    ----------
    keys : array of uint64, shape (trees, 4, 2, 2)
        a pair for each bit of a leaf's number, from the lowest.
    below : array of uint64, shape (3, trees, 2, 2)
        filled with the sums of left and right nodes, hidden by the keys.

    Returns
    -------
    leaves : array of uint64, shape (trees, 16, 2)
    """
    nodes = keys[:, DEPTH - 1]
    for bit in reversed(range(DEPTH - 1)):
        children = _grown(nodes)
        np.bitwise_xor.reduce(children, axis=1, out=below[bit])
        below[bit] ^= keys[:, bit]
        nodes = children.reshape(_TREES, -1, 2)
    return nodes


def _leaves_but(path, keys, below):
    """The leaves of all trees, but one of each; see `_leaves`.

    Parameters
    ----------
    path : array of int, shape (trees, 4)
        bits of the missing leaf's number, from the lowest.
    keys : array of uint64, shape (trees, 4, 2)
        those of the other bits.
    below : array of uint64, shape (3, trees, 2, 2)
    """
    trees = np.arange(_TREES)
    nodes = np.zeros((_TREES, 2, 2), dtype=np.uint64)
    missing = path[:, DEPTH - 1]
    nodes[trees, 1 - missing] = keys[:, DEPTH - 1]
    for bit in reversed(range(DEPTH - 1)):
        children = _grown(nodes)
        children[trees, missing] = 0
        side = 1 - path[:, bit]
        others = np.bitwise_xor.reduce(children, axis=1)[trees, side]
        found = below[bit, trees, side] ^ keys[:, bit] ^ others
        children[trees, missing, side] = found
        missing = 2 * missing + path[:, bit]
        nodes = children.reshape(_TREES, -1, 2)
    return nodes


def _grown(nodes):
    """Left and right below nodes; shape (trees, n, 2) to (trees, n, 2, 2)."""
    return np.stack([hashed(public_cipher(key), nodes) for key in _KEYS], axis=2)


def public_cipher(key):
    """AES under a key that both owners know."""
    return Cipher(algorithms.AES(key), modes.ECB())


def _rows(columns, size):
    columns = np.ascontiguousarray(columns).reshape(COLUMNS, -1)
    return bitslices.gathered(columns, size).view(np.uint64)


def hashed(cipher, rows):
    """AES of blocks, shape (..., 2), and these added to it."""
    out = np.frombuffer(cipher.encryptor().update(rows.tobytes()), np.uint64)
    return out.reshape(rows.shape) ^ rows


class Transfers:
    """Random oblivious transfers between the owners, in both directions.

    Parameters
    ----------
    session : PairSession
    """

    def __init__(self, session):
        self._directions = {p: _Direction(session, p) for p in (MOVING, STATIC)}
        self._pid = session.pid

    def reserve(self, n, sender=MOVING):
        """Make sure of n transfers, ahead of what will take them.

        Parameters
        ----------
        n : int
        sender : int, optional
        """
        self._directions[sender].reserve(n)

    def left(self, sender=MOVING):
        """How many transfers there are ahead."""
        return self._directions[sender].left

    def pads(self, n, sender):
        """The next n transfers.

        Parameters
        ----------
        n : int
        sender : int
            the owner that has both pads.

        Returns
        -------
        transfers : Sent or Chosen
        """
        return self._directions[sender].take(n)

    def products(self, size):
        """Random bits of each owner, and parts of their products, eight to a byte.

        The moving owner is the sender: its bit is the sum, modulo 2, of its pads'
        lowest bits.

        Parameters
        ----------
        size : int
            bytes.

        Returns
        -------
        mine : array of uint8, shape (size,)
            this owner's bits.
        part : array of uint8, shape (size,)
            its part of ``mine & theirs``.
        """
        taken = self.pads(8 * size, MOVING)
        if self._pid == MOVING:
            first, second = (_lowest(pad) for pad in taken)
            return first ^ second, first
        return bitslices.packed(taken.choices), _lowest(taken.pad)


def _lowest(pads):
    return np.packbits(pads[:, 0].astype(np.uint8) & np.uint8(1), bitorder="little")
