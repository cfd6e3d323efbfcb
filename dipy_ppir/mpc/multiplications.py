r"""Products of random numbers of two owners, made ahead.

The moving owner draws words a of 128 bits, the static owner b, and they get parts of
:math:`a b` modulo 2**128, which any later product of theirs can be made of (Beaver
1991). A product has up to 254 bits as an integer, so it is computed modulo
:math:`M = \prod t_k`, nine primes of 40 bits, in the slots of as many polynomials
modulo t_k: the moving owner sends a encrypted, the static owner multiplies by b, adds a
number r and sends it back (see `bfv`). With r uniform over some M / 8 numbers from
M / 4 on nothing wraps around modulo M, and the sum tells of products no more than one
part in 2**`HIDDEN`.

Where what is wanted is a sum of several products, number by number, they are added up
under encryption, and one sum comes back.

Rounds of a batch: 2. Bytes of a batch of `BATCH` sums of k products: ``9 * (k *
bfv.CIPHERTEXT + bfv.response_bytes(1))`` and seeds: 378 a product where k is 1, 315
where it is 2, 268 where it is 8.

What each party sees: the static owner ciphertexts; the moving owner sums as above,
which a simulator draws at random, and encryptions of its own making.
"""

import math
import secrets

import numpy as np

from dipy_ppir.mpc import bfv
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.lattice import DEGREE, SMALL_PRIMES, moduli
from dipy_ppir.mpc.ledger import MOVING
from dipy_ppir.mpc.prg import Stream

#: Most products in a sum.
MOST_TERMS = 8
#: Products that are made together.
BATCH = DEGREE
_ALL = math.prod(SMALL_PRIMES)
#: Bits of what hides a sum of products less those of a sum.
HIDDEN = _ALL.bit_length() - 3 - 254 - (MOST_TERMS - 1).bit_length()
#: Of what hides a product: random bits.
_MASK_BITS = _ALL.bit_length() - 3


class Multiplications:
    """Products that are made ahead, and sums of several; see the module.

    Parameters
    ----------
    session : PairSession
    """

    def __init__(self, session):
        self.session = session
        self._stream = Stream(secrets.token_bytes(32))
        #: Factors and parts that are left, by the number of terms of a sum.
        self._pools = {}

    def reserve(self, count, terms=1):
        """Make as many as are missing, so that `count` can be taken at once.

        Rounds: 2 if any are missing. Bytes: see the module.
        """
        self.session.check_process()
        factors, parts = self._pool(terms)
        batches = -(-(count - len(parts)) // BATCH)
        if batches <= 0:
            return
        made = self._batches(batches, terms)
        more, parts_of_more = zip(*made, strict=True)
        self._pools[terms] = (
            np.concatenate([factors, *more], axis=1),
            np.concatenate([parts, *parts_of_more]),
        )

    def take(self, count):
        """Products of random numbers; none is given twice.

        Parameters
        ----------
        count : int

        Returns
        -------
        factors : array of uint64, shape (count, 2)
            this owner's, in the ring of 128 bits.
        parts : array of uint64, shape (count, 2)
            this owner's parts of the products.
        """
        factors, parts = self.sums(count, 1)
        return factors[0], parts

    def sums(self, count, terms):
        """Sums of products of random numbers; none is given twice.

        Parameters
        ----------
        count : int
        terms : int
            products in a sum, at most `MOST_TERMS`.

        Returns
        -------
        factors : array of uint64, shape (terms, count, 2)
            this owner's.
        parts : array of uint64, shape (count, 2)
            this owner's parts of the sums.
        """
        # No copy of the process takes the same ones: `reserve` checks that.
        self.reserve(count, terms)
        factors, parts = self._pool(terms)
        self._pools[terms] = factors[:, count:], parts[count:]
        return factors[:, :count].copy(), parts[:count].copy()

    def _pool(self, terms):
        if not 0 < terms <= MOST_TERMS:
            raise ValueError(f"1 to {MOST_TERMS} products are added up, not {terms}")
        empty = np.empty((terms, 0, 2), np.uint64), np.empty((0, 2), np.uint64)
        return self._pools.get(terms, empty)

    def _batches(self, count, terms):
        """Batches, one after the other: while one comes back the next one is sent."""
        if self.session.pid != MOVING:
            return [self._answered(terms) for _ in range(count)]
        out, sent = [], self._sent(terms)
        for k in range(count):
            ahead = self._sent(terms) if k + 1 < count else None
            out.append((sent, self._read()))
            sent = ahead
        return out

    def _drawn(self, terms):
        """This owner's factors of a batch."""
        return np.stack([self._stream.words((BATCH, 2)) for _ in range(terms)])

    def _sent(self, terms):
        """The moving owner's factors of a batch, once they are sent encrypted."""
        factors = self._drawn(terms)
        for modulus in moduli(SMALL_PRIMES):
            messages = (
                _to_slots(modulus, _signed_residues(modulus, x)) for x in factors
            )
            self.session.encryption.send("factors", messages, modulus.prime)
        return factors

    def _read(self):
        """The moving owner's parts of a batch."""
        read = [
            _of_slots(m, self.session.encryption.read("products", 1, m.prime)[0])
            for m in moduli(SMALL_PRIMES)
        ]
        return _joined(read)

    def _answered(self, terms):
        """The static owner's factors and parts of a batch."""
        encryption = self.session.encryption
        factors, mask = self._drawn(terms), self._mask()
        for modulus in moduli(SMALL_PRIMES):
            pairs = encryption.receive("factors", terms)
            total = np.zeros_like(pairs[0])
            for pair, x in zip(pairs, factors, strict=True):
                plain = _to_slots(modulus, _signed_residues(modulus, x))
                plain = bfv.plain(_centered(plain, modulus.prime))
                bfv.add_product(total, pair, plain)
            hidden = np.empty(DEGREE)
            modulus.reduced(mask, hidden)
            hidden = _to_slots(modulus, hidden)
            weights = bfv.Weights(modulus.prime / 2, terms * DEGREE)
            encryption.answer("products", total, hidden, modulus.prime, weights)
        return factors, R128.neg(np.ascontiguousarray(mask[:, :2]))

    def _mask(self):
        """Uniform numbers below 2**_MASK_BITS, and a fourth of M (shape: words)."""
        words = -(-_ALL.bit_length() // 64)
        mask = self._stream.words((BATCH, words))
        top = _MASK_BITS - 64 * (words - 1)
        mask[:, -1] &= np.uint64((1 << top) - 1)
        return _plus(mask, _ALL // 4)


def _plus(numbers, constant):
    """Numbers of several words, low word first, and a public one."""
    out, carry = np.empty_like(numbers), np.zeros(len(numbers), np.uint64)
    for w in range(numbers.shape[1]):
        word = np.uint64(constant >> 64 * w & (1 << 64) - 1)
        total = numbers[:, w] + word
        over = (total < word).astype(np.uint64)
        out[:, w] = total + carry
        carry = over + (out[:, w] < total).astype(np.uint64)
    return out


def _signed_residues(modulus, elements):
    """Residues of elements of the ring of 128 bits, as signed numbers."""
    out = np.empty(len(elements))
    modulus.reduced(elements, out)
    negative = elements[:, 1] >> np.uint64(63)
    return out - negative * float(pow(2, 128, modulus.prime))


def _to_slots(modulus, residues):
    """The polynomial with these values, as integers in [0, prime)."""
    values = np.ascontiguousarray(residues, dtype=float)
    modulus.untransform(values)
    return modulus.integers(values)


def _of_slots(modulus, integers):
    """The values of a polynomial, as integers in [0, prime)."""
    values = modulus.residues(integers)
    modulus.transform(values)
    return modulus.integers(values)


def _centered(integers, prime):
    signed = integers.astype(np.int64)
    return np.where(signed > prime // 2, signed - prime, signed)


def _joined(residues):
    """Numbers modulo 2**128 of their residues, which are M / 4 or more.

    The remainder theorem: a sum of multiples of M / t_k, less M as often as their
    fractions of M add up to; as no number is near a multiple of M, that is known from
    doubles.
    """
    total, fraction = R128.zeros((BATCH,)), np.zeros(BATCH)
    for modulus, integers in zip(moduli(SMALL_PRIMES), residues, strict=True):
        rest = _ALL // modulus.prime
        part = modulus.residues(integers)
        zero = np.zeros_like(part)
        part = modulus.scaled_difference(part, zero, pow(rest, -1, modulus.prime))
        part = modulus.integers(part)
        fraction += part / modulus.prime
        wide = np.stack([part, np.zeros_like(part)], axis=-1)
        total = R128.add(total, R128.scale(wide, rest))
    times = np.floor(fraction).astype(np.int64)
    return R128.sub(total, R128.scale(R128.encode_int(times), _ALL))
