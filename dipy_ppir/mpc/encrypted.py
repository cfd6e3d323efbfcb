r"""Sums of products of rows of one owner with rows of the other, under encryption.

One owner, the *holder*, has rows y of n numbers and encrypts them once; the other has
rows x, as often as it likes. Modulo a power of two they get additive parts of

.. math:: P_{kr} = \sum_i x_{ki}\, y_{ri} \quad\text{or}\quad
          C_k = \sum_{r,i} x_{kri}\, y_{ri}.

**Packing.** A polynomial holds T rows of a block of b numbers of the holder's, number i
of row r at :math:`X^{i + r b}`; what it is multiplied by holds S rows of the other
owner's, number i of row k at :math:`X^{b - 1 - i + k T b}` (or, of the second kind, all
T rows one after the other, from behind). With :math:`S T b \le N` the product has the
sum over the block of row k with row r at :math:`X^{b - 1 + r b + k T b}` (or of row k
at :math:`X^{(k + 1) T b - 1}`): no other pair of numbers gets there, and what wraps
around does so below. Products of blocks are added up before they go back (Huang, Lu,
Hong and Ding 2022 multiply matrices like that).

==============  ======  ============================================================
verb            rounds  bytes
==============  ======  ============================================================
`encrypt`       1       `bfv.CIPHERTEXT` for each of `ciphertexts` polynomials, and
                        a seed, from the holder; before, as much for a new key if
                        `bfv.Encryption.renew` makes one
`products`      1       `bfv.response_bytes` for each T rows of the holder's and S
                        of the other owner's, of T S coefficients, from the other
                        owner
`contractions`  1       the same for each S rows of the other owner's, of S
==============  ======  ============================================================

What each party sees: the other owner ciphertexts, the holder numbers plus a mask that
is uniform and an encryption of its own making; see `bfv`.
"""

from typing import NamedTuple

import numpy as np

from dipy_ppir.mpc import bfv
from dipy_ppir.mpc.lattice import DEGREE, PRIMES

#: Most bits of the numbers.
MOST_BITS = 48
#: What is traded when rows are packed: milliseconds to prepare a polynomial, to
#: multiply one, to send one back, and to encrypt and send one; and how often what is
#: encrypted is used, by default.
COSTS, USES = (0.3, 0.1, 4.0, 4.0), 20


class Packing(NamedTuple):
    """How rows are put into polynomials; see the module.

    Attributes
    ----------
    block : int
        numbers of a row in one polynomial.
    together : int
        rows of the holder's.
    others : int
        rows of the other owner's.
    """

    block: int
    together: int
    others: int

    def blocks(self, length):
        """Where blocks begin and end."""
        return [
            (start, min(start + self.block, length))
            for start in range(0, length, self.block)
        ]


def choose_packing(rows, length, others, uses=USES):
    """The packing that costs least, as far as is known beforehand.

    Parameters
    ----------
    rows, length : int
        of the holder's numbers.
    others : int
        rows that the other owner usually brings.
    uses : int, optional
        how often.
    """
    best = None
    for together in range(1, min(rows, DEGREE // 2) + 1):
        for most in range(1, min(others, DEGREE // together) + 1):
            block = min(DEGREE // (together * most), length)
            packing = Packing(block, together, most)
            blocks = -(-length // block)
            mine, theirs = -(-rows // together), -(-others // most)
            prepare, multiply, answer, encrypt = COSTS
            each = (
                blocks * theirs * (prepare + multiply * mine) + answer * theirs * mine
            )
            cost = uses * each + blocks * mine * encrypt
            if best is None or cost < best[0]:
                best = cost, packing
    return best[1]


class EncryptedRows:
    """Rows of one owner, encrypted, and their products; see the module.

    Parameters
    ----------
    session : PairSession
    name : str
        the protocol step.
    holder : int
        the owner that has the rows.
    rows, length : int
        how many, and of how many numbers; public.
    bits : int
        numbers are integers modulo ``2**bits``.
    others : int, optional
        rows that the other owner usually brings: what is sent is packed for so many.
    uses : int, optional
        how often what is encrypted is used, about.

    Raises
    ------
    NoiseBudgetError
        if so many numbers of so many bits leave no room for noise.
    """

    def __init__(
        self,
        session,
        name,
        holder,
        *,
        rows,
        length,
        bits,
        others=1,
        uses=USES,
    ):
        if not 0 < bits <= MOST_BITS:
            raise ValueError(f"bits must be from 1 to {MOST_BITS}, got {bits}")
        self.session, self.name, self.holder = session, name, holder
        self.rows, self.length, self.bits = rows, length, bits
        self.packing = choose_packing(rows, length, others, uses)
        self._pairs = self._key = self._y = None
        bfv.check_budget(self.modulus, self._weights(contracted=True))

    @property
    def modulus(self):
        """Numbers are modulo this."""
        return 1 << self.bits

    @property
    def ciphertexts(self):
        """How many polynomials are sent encrypted."""
        p = self.packing
        return len(p.blocks(self.length)) * -(-self.rows // p.together)

    def responses(self, count, *, contracted=False):
        """How many polynomials go back."""
        groups = 1 if contracted else -(-self.rows // self.packing.together)
        return groups * -(-count // self.packing.others)

    def response_bytes(self, count, *, contracted=False):
        """Bytes of what goes back."""
        kept = bfv.kept_primes(self.modulus)
        whole = self.responses(count, contracted=contracted)
        wanted = count if contracted else count * self.rows
        each = bfv.response_bytes(kept, 0)
        return whole * each + wanted * (bfv.response_bytes(kept, 1) - each)

    def _weights(self, *, contracted):
        """What is known of what a sum is multiplied by."""
        count = self.length * self.packing.others * (self.rows if contracted else 1)
        return bfv.Weights(2.0 ** (self.bits - 1), count)

    def _groups(self):
        return [
            (start, min(start + self.packing.together, self.rows))
            for start in range(0, self.rows, self.packing.together)
        ]

    def encrypt(self, y=None):
        """Encrypt the holder's rows; those before are forgotten. Rounds: 1.

        Parameters
        ----------
        y : array of int or callable, at the holder only
            shape (rows, length), or ``y(start, stop)`` of shape (rows, stop - start).

        Raises
        ------
        ValueError
            before anything is sent, if the numbers are no integers or of another shape.
        """
        if self.session.pid == self.holder:
            _check(y, (self.rows, self.length), "rows to be encrypted")
        encryption, self._y = self.session.encryption, y
        encryption.renew(self.holder)
        self._key = encryption.key(self.holder)
        if self.session.pid == self.holder:
            encryption.send(self.name, self._messages(y), self.modulus)
        else:
            self._pairs = encryption.receive(self.name, self.ciphertexts, self._pairs)

    def renew(self, bits):
        """Encrypt again, with a new key, if this one may show too much.

        Rounds: 1 if it may, for both; see `bfv.Encryption.renew`.

        Parameters
        ----------
        bits : float
            to be opened to the other owner before this is asked again.
        """
        if self.session.encryption.worn(self.holder, self._key, bits):
            self.encrypt(self._y)

    def _messages(self, y):
        p, mask = self.packing, np.int64(self.modulus - 1)
        for start, stop in p.blocks(self.length):
            part = _part(y, start, stop)
            for low, high in self._groups():
                message = np.zeros((p.together, p.block), np.uint64)
                message[: high - low, : stop - start] = part[low:high] & mask
                yield _filled(message.reshape(-1)).astype(np.uint64)

    def products(self, count, x=None):
        """This owner's part of the products of rows. Rounds: 1.

        Parameters
        ----------
        count : int
            rows of the other owner's; public.
        x : array of int or callable, at the other owner only
            shape (count, length), or ``x(start, stop)`` of shape (count, stop - start).

        Returns
        -------
        part : array of uint64, shape (count, rows)
            modulo ``2**bits``.
        """
        self._check_others(x, (count, self.length))
        p, groups = self.packing, self._groups()

        def polynomials(part, low, high):
            out = np.zeros((p.others, p.together * p.block), np.int64)
            numbers = self._signed(part[low:high])
            out[: high - low, p.block - numbers.shape[1] : p.block] = numbers[:, ::-1]
            return out

        def places(some, group):
            low, high = groups[group]
            rows = np.arange(high - low) + np.arange(some)[:, None] * p.together
            return (p.block * (1 + rows) - 1).reshape(-1)

        out = np.empty((count, self.rows), np.uint64)
        for first, group, sums in self._answers(
            count, x, polynomials, places, len(groups), contracted=False
        ):
            low, high = groups[group]
            sums = sums.reshape(-1, high - low)
            out[first : first + len(sums), low:high] = sums
        return out

    def contractions(self, count, x=None):
        """This owner's part of sums over all rows. Rounds: 1.

        Parameters
        ----------
        count : int
            public.
        x : array of int or callable, at the other owner only
            shape (count, rows, length), or ``x(start, stop)`` of shape (count, rows,
            stop - start).

        Returns
        -------
        part : array of uint64, shape (count,)
            modulo ``2**bits``.
        """
        self._check_others(x, (count, self.rows, self.length))
        p = self.packing
        size = p.together * p.block

        def polynomials(part, low, high, rows):
            out = np.zeros((p.others, p.together, p.block), np.int64)
            numbers = self._signed(part[low:high, slice(*rows)])
            out[: high - low, : numbers.shape[1], : numbers.shape[2]] = numbers
            return out.reshape(p.others, size)[:, ::-1]

        def places(some, _):
            return (np.arange(some) + 1) * size - 1

        out = np.empty(count, np.uint64)
        for first, _, sums in self._answers(
            count, x, polynomials, places, 1, contracted=True
        ):
            out[first : first + len(sums)] = sums
        return out

    def _check_others(self, x, shape):
        if self.session.pid != self.holder:
            _check(x, shape, "rows to be multiplied by")

    def _answers(self, count, x, polynomials, places, answers, *, contracted):
        """What goes back: first row of the other owner's, group, and this part of it.

        Of the polynomials only the coefficients at ``places(rows, group)`` count.
        The other owner sends them all before it returns one: what it sends is small.
        """
        encryption, p = self.session.encryption, self.packing
        firsts = range(0, count, p.others)
        name, t, key = self.name + "-back", self.modulus, self._key
        if self.session.pid == self.holder:
            for first in firsts:
                for group in range(answers):
                    wanted = places(min(p.others, count - first), group)
                    (sums,) = encryption.read(name, 1, t, key, wanted)
                    yield first, group, sums
            return
        totals = np.zeros((len(firsts), answers, 2, len(PRIMES), DEGREE))
        groups = self._groups()
        for block, (start, stop) in enumerate(p.blocks(self.length)):
            part = _part(x, start, stop)
            pairs = self._pairs[block * len(groups) : (block + 1) * len(groups)]
            for total, first in zip(totals, firsts, strict=True):
                high = min(first + p.others, count)
                if contracted:
                    for pair, rows in zip(pairs, groups, strict=True):
                        integers = polynomials(part, first, high, rows)
                        bfv.add_product(total[0], pair, _plain(integers))
                    continue
                polynomial = _plain(polynomials(part, first, high))
                for answer, pair in zip(total, pairs, strict=True):
                    bfv.add_product(answer, pair, polynomial)
        weights = self._weights(contracted=contracted)
        for total, first in zip(totals, firsts, strict=True):
            for group in range(answers):
                mask = encryption.mask(t)
                wanted = places(min(p.others, count - first), group)
                encryption.answer(name, total[group], mask, t, weights, key, wanted)
                yield first, group, -mask.numbers[wanted] & np.uint64(t - 1)

    def _signed(self, x):
        """Words as integers near zero."""
        x = np.asarray(x).astype(np.int64)
        half = np.int64(self.modulus >> 1)
        return (x + half & np.int64(self.modulus - 1)) - half


def _check(numbers, shape, what):
    """Raise ValueError for what are no integers of a shape."""
    if callable(numbers):
        return
    numbers = np.asarray(numbers)
    if numbers.shape != shape or numbers.dtype.kind not in "iu":
        raise ValueError(
            f"{what} must be integers of shape {shape}, got {numbers.dtype} of shape "
            f"{numbers.shape}"
        )


def _plain(integers):
    """Coefficients, in rows, as a polynomial to multiply by."""
    return bfv.plain(_filled(integers.reshape(-1)))


def _part(numbers, start, stop):
    """Numbers of a block."""
    if not callable(numbers):
        return np.asarray(numbers)[..., start:stop]
    part = np.asarray(numbers(start, stop))
    _check(part, (*part.shape[:-1], stop - start), "rows of a block")
    return part


def _filled(coefficients):
    """Coefficients with zeros up to the degree."""
    out = np.zeros(DEGREE, coefficients.dtype)
    out[: len(coefficients)] = coefficients
    return out
