r"""Random oblivious transfers between two owners, made in batches ahead of their use.

In a transfer the *sender* gets two random pads of 128 bits, the *chooser* a random bit
and the pad of that number. The sender does not learn the bit, the chooser nothing of
the other pad. Of few transfers many are made (Ishai, Kilian, Nissim and Petrank 2003,
figure 1, against curious parties):

1. Once for each direction the roles are turned round: the sender draws 128 bits s, and
   of each of 128 pairs of seeds that the chooser knows it gets the one of that bit.
   These base transfers are oblivious products: with :math:`s_j` times a random
   :math:`d_j` in parts :math:`u_j + v_j` modulo 2**128, the seeds are :math:`-v_j` and
   :math:`d_j - v_j`, and the sender's part is the one of them that it chose.
2. For a batch of m the chooser makes two columns of m bits of each pair of seeds, and
   sends their sum modulo 2 plus its m random choices c. The sender adds what it gets
   to its own column where :math:`s_j = 1`. Row i of the sender's columns is then
   :math:`q_i = t_i + c_i s`, where :math:`t_i` is the chooser's row.
3. The pads are :math:`H(q_i)` and :math:`H(q_i + s)`; the chooser has
   :math:`H(t_i)`, which is the one of them that it chose.

H is ``AES(x) + x``, modulo 2, with a public key that is drawn anew for each batch; it
must be correlation robust (Guo, Katz, Wang and Yu 2020, section 7), as is assumed of it
elsewhere (`steps`). With a new key each batch has to be attacked on its own.

==========  ======  ===================================================================
step        rounds  bytes on the link
==========  ======  ===================================================================
base        1       128 * 16, and 128 products of `session.multiplications`; once for
                    each direction
batch       1       16 per transfer; sizes are doubled from 2**12 to 2**18, or what is
                    asked for
`products`  0       0; takes 8 transfers a byte
`pads`      0       0
==========  ======  ===================================================================

What each owner sees: the sender of a base transfer's choice sends :math:`s_j` less a
random factor that only it knows, uniform modulo 2**128. Columns are hidden by a column
of the seed that the sender has not got, so they are as good as uniform. A sender that
keeps to the protocol learns nothing else; a chooser that does not could learn bits of s
(this is the protocol for curious parties).
"""

import secrets
from typing import NamedTuple

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
import numpy as np

from dipy_ppir.mpc import bitslices
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.prg import Stream, derive_key

#: Columns of an extension: bits of security.
COLUMNS = 128
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
        self.reserve(n)
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
        """The base transfers."""
        session = self._session
        factor, part = session.multiplications.take(COLUMNS)
        if self._sends:
            self._secret = np.frombuffer(secrets.token_bytes(COLUMNS // 8), np.uint8)
            bits = bitslices.spread(self._secret, COLUMNS)
            words = R128.encode_int(bits)
            session.network.send(session.other, self._name, R128.sub(words, factor))
            seeds = [part]
        else:
            words = session.receive_elements(
                session.other, R128, (COLUMNS,), self._name
            )
            rest = R128.neg(R128.add(R128.mul(words, factor), part))
            seeds = [rest, R128.add(factor, rest)]
        purpose = self._name.encode()
        self._streams = [
            [Stream(derive_key(seed.tobytes(), purpose)) for seed in column]
            for column in seeds
        ]

    def _columns(self, streams, size):
        out = np.empty((COLUMNS, size // 8), dtype=np.uint8)
        for stream, column in zip(streams, out, strict=True):
            stream.fill(column)
        return out

    def _batch(self, size):
        """A batch of transfers, a multiple of 8; rounds: 1."""
        session = self._session
        cipher = Cipher(algorithms.AES(self._hash_keys.words(2).tobytes()), modes.ECB())
        columns = self._columns(self._streams[0], size)
        if self._sends:
            theirs = np.empty_like(columns)
            session.network.receive(session.other, self._name, theirs)
            columns ^= theirs * bitslices.spread(self._secret, COLUMNS)[:, None]
            rows = _rows(columns, size)
            other = rows ^ self._secret.view(np.uint64)
            return [_hashed(cipher, rows), _hashed(cipher, other)]
        choices = np.frombuffer(secrets.token_bytes(size // 8), np.uint8)
        theirs = self._columns(self._streams[1], size)
        theirs ^= columns
        theirs ^= choices
        session.network.send(session.other, self._name, theirs)
        rows = _rows(columns, size)
        return [bitslices.spread(choices, size), _hashed(cipher, rows)]


def _rows(columns, size):
    return bitslices.gathered(columns, size).view(np.uint64)


def _hashed(cipher, rows):
    """Hash rows; shape (n, 2)."""
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
