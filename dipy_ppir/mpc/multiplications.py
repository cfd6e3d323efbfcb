r"""Products of random numbers of two owners, made ahead.

The moving owner draws words a of 128 bits, the static owner b, and they get parts of
:math:`a b` modulo 2**128, which any later product of theirs can be made of (Beaver
1991). A product has up to 254 bits as an integer, so it is computed modulo
:math:`M = \prod t_k`, nine primes of 40 bits, in the slots of as many polynomials
modulo t_k: the moving owner sends a encrypted, the static owner multiplies by b, adds a
number r and sends it back (see `bfv`). With r uniform over M / 4 numbers from M / 4 on
nothing wraps around modulo M, and the sum tells of a product no more than one part in
2**`HIDDEN`.

Rounds of a batch: 2. Bytes of a batch of `BATCH` products: ``9 *
(bfv.CIPHERTEXT + bfv.response_bytes(1))`` and seeds: 378 a product.

What each party sees: the static owner ciphertexts; the moving owner sums as above,
which a simulator draws at random, and encryptions of its own making.
"""

import math
import secrets

import numpy as np

from dipy_ppir.mpc import bfv, lattice
from dipy_ppir.mpc.fields import R128
from dipy_ppir.mpc.lattice import DEGREE, SMALL_PRIMES, moduli
from dipy_ppir.mpc.ledger import MOVING
from dipy_ppir.mpc.prg import Stream

#: Products that are made together.
BATCH = DEGREE
_ALL = math.prod(SMALL_PRIMES)
#: Bits of what hides a product less those of a product.
HIDDEN = _ALL.bit_length() - 3 - 254
#: Of what hides a product: random bits.
_MASK_BITS = _ALL.bit_length() - 3


class Multiplications:
    """Products that are made ahead; see the module.

    Parameters
    ----------
    session : PairSession

    Attributes
    ----------
    made : int
        how many so far.
    """

    def __init__(self, session):
        self.session, self.made = session, 0
        self._stream = Stream(secrets.token_bytes(32))
        self._factors = self._parts = np.empty((0, 2), np.uint64)

    def reserve(self, count):
        """Make as many as are missing, so that `count` can be taken at once.

        Rounds: 2 if any are missing. Bytes: see the module.
        """
        batches = -(-(count - len(self._factors)) // BATCH)
        if batches <= 0:
            return
        made = [self._batch() for _ in range(batches)]
        factors, parts = zip(*made, strict=True)
        self._factors = np.concatenate([self._factors, *factors])
        self._parts = np.concatenate([self._parts, *parts])
        self.made += batches * BATCH

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
        self.reserve(count)
        taken = self._factors[:count].copy(), self._parts[:count].copy()
        self._factors, self._parts = self._factors[count:], self._parts[count:]
        return taken

    def _batch(self):
        encryption = self.session.encryption
        factors = self._stream.words((BATCH, 2))
        # Their magnitude as signed numbers: the product then has 254 bits.
        moduli_of_all = moduli(SMALL_PRIMES)
        if self.session.pid == MOVING:
            for modulus in moduli_of_all:
                message = _to_slots(modulus, _signed_residues(modulus, factors))
                encryption.send("factors", [message], modulus.prime)
            read = [
                _of_slots(m, encryption.read("products", 1, m.prime)[0])
                for m in moduli_of_all
            ]
            return factors, _joined(read)
        mask = self._mask()
        for modulus in moduli_of_all:
            (pair,) = encryption.receive("factors", 1)
            plain = _to_slots(modulus, _signed_residues(modulus, factors))
            plain = bfv.plain(_centered(plain, modulus.prime))
            total = np.zeros_like(pair)
            for half in range(2):
                lattice.multiplied(pair[half], plain, out=total[half])
            hidden = np.empty(DEGREE)
            modulus.reduced(mask, hidden)
            hidden = _to_slots(modulus, hidden)
            weights = bfv.Weights(modulus.prime / 2, DEGREE)
            encryption.answer("products", total, hidden, modulus.prime, weights)
        return factors, R128.neg(np.ascontiguousarray(mask[:, :2]))

    def _mask(self):
        """Uniform numbers over a fourth of M, from a fourth of M on."""
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
