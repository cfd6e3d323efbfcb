r"""Elementwise products of numbers of one owner with the other's, under encryption.

Polynomials modulo a prime t of which roots of -1 exist are as good as their values at
these roots, *slots*, and products of polynomials are elementwise products of slots. One
owner, the *holder*, encrypts its numbers in slots once; the other multiplies several
ciphertexts, each by numbers of its own, and they get parts modulo t of the sums over
the ciphertexts, slot by slot.

=========  ======  ================================================================
verb       rounds  bytes
=========  ======  ================================================================
`encrypt`  1       `bfv.CIPHERTEXT` for each ciphertext, and a seed, from the
                   holder; before, as much for a new key if `bfv.Encryption.renew`
                   makes one
`sums`     1       `bfv.response_bytes` of two primes for each sum, from the other
                   owner
=========  ======  ================================================================

What each party sees: the other owner ciphertexts, the holder numbers plus a mask that
is uniform modulo t, and an encryption of its own making; see `bfv`.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dipy_ppir.mpc import bfv, lattice
from dipy_ppir.mpc.lattice import DEGREE
from dipy_ppir.mpc.threads import threads

#: Numbers are modulo this, and a ciphertext has so many.
PRIME, SLOTS = 1099511480321, DEGREE
(_MODULUS,) = lattice.moduli((PRIME,))


class EncryptedSlots:
    """Numbers of one owner, encrypted, and their products; see the module.

    Parameters
    ----------
    session : PairSession
    name : str
        the protocol step.
    holder : int
        the owner that has the numbers.
    """

    def __init__(self, session, name, holder):
        self.session, self.name, self.holder = session, name, holder
        self._pairs = self._key = None

    def encrypt(self, count, rows=None):
        """Encrypt the holder's numbers; those before are forgotten. Rounds: 1.

        Parameters
        ----------
        count : int
            of ciphertexts.
        rows : iterable of array of int, shape (`SLOTS`,), at the holder only
            of magnitude below t / 2.
        """
        encryption = self.session.encryption
        encryption.renew(self.holder)
        self._key = encryption.key(self.holder)
        if self.session.pid == self.holder:
            messages = (_MODULUS.integers(_polynomial(row)) for row in rows)
            encryption.send(self.name, messages, PRIME)
        else:
            self._pairs = encryption.receive(self.name, count)

    def sums(self, wanted):
        """This owner's parts of sums of products, slot by slot. Rounds: 1.

        Parameters
        ----------
        wanted : sequence of (rows, factors)
            for each sum the range of its ciphertexts and, at the other owner, an
            iterable of what each is multiplied by: arrays of int, shape (`SLOTS`,), of
            magnitude below t / 2. Those of several sums are asked for at a time.

        Yields
        ------
        part : array of uint64, shape (`SLOTS`,)
            modulo t.
        """
        encryption, name = self.session.encryption, self.name + "-back"
        if self.session.pid == self.holder:
            for _ in wanted:
                yield _values(encryption.read(name, 1, PRIME, self._key)[0])
            return
        with ThreadPoolExecutor(threads()) as pool:
            totals = pool.map(self._total, *zip(*wanted, strict=True))
            for (rows, _), total in zip(wanted, totals, strict=True):
                mask = encryption.mask(PRIME)
                weights = bfv.Weights(PRIME / 2, SLOTS * len(rows))
                encryption.answer(name, total, mask, PRIME, weights, self._key)
                yield (np.uint64(PRIME) - _values(mask.numbers)) % np.uint64(PRIME)

    def _total(self, rows, factors):
        """A sum of products, encrypted."""
        total = np.zeros(self._pairs.shape[1:])
        for row, factor in zip(rows, factors, strict=True):
            bfv.add_product(total, self._pairs[row], bfv.plain(_polynomial(factor)))
        return total


def _polynomial(slots):
    """The polynomial with these values, its coefficients near zero."""
    values = np.array(slots, dtype=float)
    _MODULUS.untransform(values)
    return values


def _values(coefficients):
    """The values of a polynomial, integers in [0, t)."""
    values = _MODULUS.residues(coefficients)
    _MODULUS.transform(values)
    return _MODULUS.integers(values)
