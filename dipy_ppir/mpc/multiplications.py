r"""Products of random numbers of two owners, made ahead.

The moving owner draws words a of 128 bits, the static owner b, and they get parts of
:math:`a b` modulo 2**128, which any later product of theirs can be made of (Beaver
1991). A product has up to 254 bits as an integer, so it is computed modulo
:math:`M = \prod t_k`, seven primes of 48 bits, in the slots of as many polynomials
modulo t_k: the moving owner sends a encrypted, the static owner multiplies by b, adds a
number r that is uniform modulo M and sends it back (see `bfv`). Nothing wraps around
modulo M but where r is nearly 0 or M, which it is not: numbers r with the last
`MARGIN` of M on either side are drawn again. So a sum tells of products no more than
2**-79, a number.

Where what is wanted is a sum of several products, number by number, they are added up
under encryption, and one sum comes back.

Rounds of a batch: 2. Bytes of a batch of `BATCH` sums of k products: ``7 * (k *
bfv.CIPHERTEXT + bfv.response_bytes(2))``, seeds and a new key: 420 a product where k is
1, 308 where it is 2, 224 where it is 8.

What each party sees: the static owner ciphertexts; the moving owner sums as above,
which a simulator draws at random, and encryptions of its own making.

A static owner that answers something else chooses what the moving owner's parts are, as
a function of what the key has encrypted. So each batch has a key of its own.
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
#: Part of M that is left to products on either side of what hides them.
MARGIN = 2.0**-40
_MODULI, _ALL = moduli(SMALL_PRIMES), math.prod(SMALL_PRIMES)


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
            factors, key = sent
            out.append((factors, self._read(key)))
            sent = ahead
        return out

    def _drawn(self, terms):
        """This owner's factors of a batch."""
        return np.stack([self._stream.words((BATCH, 2)) for _ in range(terms)])

    def _sent(self, terms):
        """The moving owner's factors of a batch, sent encrypted, and their key."""
        factors, encryption = self._drawn(terms), self.session.encryption
        # An answer can be made of all that a key has encrypted. Were that factors of
        # another batch, they would hide nothing where these products are used.
        encryption.make_key(MOVING)
        for modulus in _MODULI:
            messages = (
                _to_slots(modulus, _signed_residues(modulus, x)) for x in factors
            )
            encryption.send("factors", messages, modulus.prime)
        return factors, encryption.key(MOVING)

    def _read(self, key):
        """The moving owner's parts of a batch."""
        encryption = self.session.encryption
        read = [encryption.read("products", 1, m.prime, key)[0] for m in _MODULI]
        return _joined(read)[0]

    def _answered(self, terms):
        """The static owner's factors and parts of a batch."""
        encryption = self.session.encryption
        encryption.make_key(MOVING)
        factors, (masks, numbers) = self._drawn(terms), self._masks()
        for modulus, mask in zip(_MODULI, masks, strict=True):
            pairs = encryption.receive("factors", terms)
            total = np.zeros_like(pairs[0])
            for pair, x in zip(pairs, factors, strict=True):
                plain = _to_slots(modulus, _signed_residues(modulus, x))
                plain = bfv.plain(_centered(plain, modulus.prime))
                bfv.add_product(total, pair, plain)
            weights = bfv.Weights(modulus.prime / 2, terms * DEGREE)
            encryption.answer("products", total, mask, modulus.prime, weights)
        return factors, R128.neg(numbers)

    def _masks(self):
        """What hides a batch, modulo each prime, and its numbers modulo 2**128."""
        while True:
            masks = [self.session.encryption.mask(m.prime) for m in _MODULI]
            numbers, part = _joined([mask.numbers for mask in masks])
            if part.min() > MARGIN and part.max() < 1 - MARGIN:
                return masks, numbers


def _signed_residues(modulus, elements):
    """Residues of elements of the ring of 128 bits, as signed numbers."""
    negative = elements[:, 1] >> np.uint64(63)
    return modulus.reduced(elements) - negative * float(pow(2, 128, modulus.prime))


def _to_slots(modulus, residues):
    """The polynomial with these values, as integers in [0, prime)."""
    values = np.ascontiguousarray(residues, dtype=float)
    modulus.untransform(values)
    return modulus.integers(values)


def _centered(integers, prime):
    signed = integers.astype(np.int64)
    return np.where(signed > prime // 2, signed - prime, signed)


def _joined(polynomials):
    """Numbers modulo 2**128 of the slots of polynomials, modulo all primes.

    The remainder theorem: a sum of multiples of M / t_k, less M as often as their
    fractions of M add up to; as no number is near a multiple of M, that is known from
    doubles.

    Returns
    -------
    numbers : array of uint64, shape (`BATCH`, 2)
    parts : array, shape (`BATCH`,)
        what they are of M, as integers in [0, M).
    """
    total, fraction = R128.zeros((BATCH,)), np.zeros(BATCH)
    for modulus, integers in zip(_MODULI, polynomials, strict=True):
        rest = _ALL // modulus.prime
        part = modulus.residues(integers)
        modulus.transform(part)
        zero = np.zeros_like(part)
        part = modulus.scaled_difference(part, zero, pow(rest, -1, modulus.prime))
        part = modulus.integers(part)
        fraction += part / modulus.prime
        wide = np.stack([part, np.zeros_like(part)], axis=-1)
        total = R128.add(total, R128.scale(wide, rest))
    times = np.floor(fraction)
    whole = R128.scale(R128.encode_int(times.astype(np.int64)), _ALL)
    return R128.sub(total, whole), fraction - times
