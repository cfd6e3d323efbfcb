r"""Words of one owner's columns that the other looks up, on shares of two owners.

The static owner has n columns of words modulo ``2**bits``, the moving owner a row of
each from which on it wants `WINDOW` of them. It gets them less masks that the static
owner draws; neither learns what the other has.

Of the rows that have a number in common modulo `WINDOW` a window holds just one. So for
each column and each such *class* the moving owner picks one of k words, the one of
number i: from :math:`l = \lceil \log_2 k \rceil` random transfers (`transfers`), of
which it has one key each, by the digits of a random number j, and the static owner
both, there are :math:`2^l` pads

.. math:: P_p = \sum_m F(\text{key } p_m \text{ of transfer } m, p), \qquad
          F(x, p) = \mathrm{AES}(x + p) + x + p,

added modulo 2, of which the moving owner can make :math:`P_j` and no other (Naor and
Pinkas 1999). It sends :math:`e = i + j`, digits added modulo 2; the static owner sends
each word, less the mask and with the pad of number :math:`p + e` for the word of number
p, and of these the moving owner reads the one that it picked. AES has a public key that
is drawn anew for each time.

==========  ======  ==================================================================
step        rounds  bytes
==========  ======  ==================================================================
`begin`     1       ``WINDOW * l / 8`` for each column, from the moving owner; as many
                    transfers of the static owner as bits
`look_up`   1       ``WINDOW * k * bits / 8`` for each column, from the static owner
==========  ======  ==================================================================

What each owner sees: the static owner sums with random digits that it does not know;
the moving owner words hidden by pads that it cannot make, and those it picked less a
uniform mask. Both are uniform: a simulator draws them.
"""

import secrets

import numpy as np

from dipy_ppir.mpc.bitslices import packed, spread, width
from dipy_ppir.mpc.ledger import MOVING, STATIC
from dipy_ppir.mpc.prg import Stream
from dipy_ppir.mpc.transfers import hashed, public_cipher

#: Rows that are looked up, one after the other.
WINDOW = 4
#: Columns that are worked on at a time.
_BLOCK = 1 << 13


class Lookups:
    """Words that the moving owner looks up in the static owner's columns.

    Parameters
    ----------
    session : PairSession
    rows, length : int
        of the columns, more than `WINDOW`, and how many of them.
    bits : int
        of the words, whole bytes, up to 56.
    """

    def __init__(self, session, *, rows, length, bits):
        self.session, self.length = session, length
        self._bytes, self._low = bits // 8, np.uint64((1 << bits) - 1)
        #: Words of a class, and binary digits of their numbers.
        self._size = -(-rows // WINDOW)
        self._digits = (self._size - 1).bit_length()

    @property
    def transfers(self):
        """How many transfers each time takes."""
        return self.length * WINDOW * self._digits

    @property
    def payload_bytes(self):
        """Bytes that are sent each time, but for what makes transfers."""
        words = self.length * WINDOW * self._size * self._bytes
        return words + sum(
            self._digits * width((stop - start) * WINDOW)
            for start, stop in self._blocks()
        )

    def _blocks(self):
        starts = range(0, self.length, _BLOCK)
        return [(start, min(start + _BLOCK, self.length)) for start in starts]

    def draw(self):
        """Draw the masks of the next time, at the static owner; local.

        Returns
        -------
        masks : array of uint64, shape (WINDOW, length)
            by which the words of each class are less, modulo ``2**bits``.
        """
        stream = Stream(secrets.token_bytes(32))
        return stream.words((WINDOW, self.length)) & self._low

    def begin(self, first=None, masks=None):
        """Say from which rows on, hidden. Rounds: 1.

        Parameters
        ----------
        first : callable, at the moving owner only
            ``first(start, stop)`` are the first rows of some columns, array of int,
            such that all of the window is inside.
        masks : array of uint64, shape (WINDOW, length), at the static owner only
            see `draw`; they serve once.

        Returns
        -------
        begun : list
            what `look_up` needs, for each block of columns.
        """
        s = self.session
        key = s.stream(s.other, b"lookups").words(2).tobytes()
        cipher = public_cipher(key)
        return [
            self._picked(cipher, first(start, stop))
            if s.pid == MOVING
            else self._pads(cipher, masks[:, start:stop])
            for start, stop in self._blocks()
        ]

    def _picked(self, cipher, first):
        """Numbers of the words picked, and their pads; at the moving owner."""
        s, digits = self.session, np.arange(self._digits)[:, None]
        first = np.asarray(first, np.int64)[:, None]
        wanted = (first + (np.arange(WINDOW) - first) % WINDOW) // WINDOW
        wanted = wanted.reshape(-1)
        taken = s.transfers.pads(wanted.size * self._digits, STATIC)
        choices = taken.choices.reshape(self._digits, -1)
        s.network.send(
            s.other, "lookups", packed(choices ^ (wanted >> digits & 1).astype(bool))
        )
        number = (choices << digits).sum(axis=0).astype(np.uint64)
        keys = taken.pad.reshape(*choices.shape, 2)
        return wanted, _pad(cipher, keys, number)

    def _pads(self, cipher, masks):
        """Pads of all words, less the masks: shape (size, columns, WINDOW); static."""
        s, count = self.session, masks.size
        taken = s.transfers.pads(count * self._digits, STATIC)
        both = [keys.reshape(self._digits, count, 2) for keys in taken]
        sums = np.empty((self._digits, width(count)), np.uint8)
        s.network.receive(s.other, "lookups", sums)
        turned = spread(sums, count).astype(np.int64)
        turned = (turned << np.arange(self._digits)[:, None]).sum(axis=0)
        pads = np.empty((1 << self._digits, count), np.uint64)
        for number, pad in enumerate(pads):
            keys = [both[number >> d & 1][d] for d in range(self._digits)]
            pad[...] = _pad(cipher, np.stack(keys), np.uint64(number))
        places = np.arange(self._size)[:, None] ^ turned
        pads = np.take_along_axis(pads, places, axis=0)
        pads -= masks.T.reshape(-1)
        return pads.reshape(self._size, -1, WINDOW)

    def look_up(self, begun, columns=None):
        """The words, less the masks. Rounds: 1.

        Parameters
        ----------
        begun : list
            what `begin` returned; it serves once.
        columns : callable, at the static owner only
            ``columns(start, stop)`` are some of them, array of uint64, shape (rows,
            stop - start).

        Returns
        -------
        words : array of uint64, shape (length, WINDOW), or None
            at the moving owner; in the order of their rows modulo `WINDOW`; modulo
            ``2**bits``.
        """
        s, out = self.session, None
        if s.pid == MOVING:
            out = np.empty((self.length, WINDOW), np.uint64)
        for (start, stop), kept in zip(self._blocks(), begun, strict=True):
            count = stop - start
            if s.pid == STATIC:
                words = np.zeros((self._size * WINDOW, count), np.uint64)
                given = columns(start, stop)
                words[: len(given)] = given
                words = words.reshape(self._size, WINDOW, count).transpose(0, 2, 1)
                words = (words + kept).astype("<u8", copy=False).view(np.uint8)
                words = words.reshape(self._size, count, WINDOW, 8)[..., : self._bytes]
                s.network.send(s.other, "words", np.ascontiguousarray(words))
                continue
            (wanted, pad), found = kept, np.zeros((count * WINDOW, 8), np.uint8)
            words = np.empty((self._size, count * WINDOW, self._bytes), np.uint8)
            s.network.receive(s.other, "words", words)
            found[:, : self._bytes] = words[wanted, np.arange(len(wanted))]
            found = found.view("<u8")[:, 0].astype(np.uint64, copy=False) - pad
            out[start:stop] = (found & self._low).reshape(count, WINDOW)
        return out


def _pad(cipher, keys, number):
    """The pad of a number: keys of shape (digits, n, 2) to words of shape (n,)."""
    keys = keys.copy()
    keys[..., 1] ^= number
    return np.bitwise_xor.reduce(hashed(cipher, keys)[..., 0], axis=0)
