r"""Polynomials modulo :math:`X^n + 1` and a product of primes.

A polynomial is kept as its residues modulo the primes, and for products as its values
at the odd powers of a root of -1 modulo each of them, where products are elementwise: a
number theoretic transform, with the roots merged (Longa and Naehrig 2016). Each stage
takes the two halves of an array and leaves what becomes of them side by side (Pease
1968), so that all stages run in vectors. Values come in bit-reversed order.

Residues are doubles that hold integers near zero; see ``lattice.h``.
"""

from functools import cache

import numpy as np

from dipy_ppir._kernels import lattice as kernels

#: Degree of the polynomials.
DEGREE = 1 << 13
#: The largest primes below 2**50 and below 2**48 of which roots of -1 exist.
PRIMES = (1125899906826241, 1125899906629633, 1125899905744897, 1125899905351681)
SMALL_PRIMES = (
    281474976694273,
    281474976546817,
    281474976317441,
    281474975662081,
    281474975563777,
    281474975367169,
    281474975285249,
)


class Modulus:
    """A prime, and the transform of polynomials modulo it.

    Parameters
    ----------
    prime : int
        below 2**50, and 1 modulo ``2 * degree``.
    degree : int
        a power of two.
    """

    def __init__(self, prime, degree=DEGREE):
        self.prime, self.degree = prime, degree
        root = _root(prime, degree)
        order = _bits_reversed(degree)
        powers, inverses = (
            _powers(r, prime, degree)[order] for r in (root, pow(root, -1, prime))
        )
        stages = list(enumerate(kernels.runs(degree)))
        self._forward = np.concatenate([_stage(powers, s, run) for s, run in stages])
        self._backward = np.concatenate(
            [_stage(inverses, s, run) for s, run in reversed(stages)]
        )
        self._scale = float(_centered(pow(degree, -1, prime), prime))

    def transform(self, a):
        """Values of polynomials, in the place of their residues, shape (..., n)."""
        kernels.forward(a.reshape(-1, self.degree), self._forward, self.prime)

    def untransform(self, a):
        """Residues of polynomials, in the place of their values."""
        kernels.backward(
            a.reshape(-1, self.degree), self._backward, self.prime, self._scale
        )

    def multiply_add(self, total, a, b):
        """Add elementwise products to a total, in its place."""
        kernels.multiply_add(
            total.reshape(-1), a.reshape(-1), b.reshape(-1), self.prime
        )

    def scaled_difference(self, a, b, constant, out=None):
        """``(a - b) * constant``, elementwise; of b what it is modulo this prime."""
        out = np.empty_like(a) if out is None else out
        constant = float(_centered(constant % self.prime, self.prime))
        kernels.scaled_difference(
            a.reshape(-1), b.reshape(-1), out.reshape(-1), self.prime, constant
        )
        return out

    def residues(self, integers, out=None):
        """Residues of integers in [0, prime)."""
        out = np.empty(integers.shape) if out is None else out
        kernels.residues(integers.reshape(-1), out.reshape(-1), self.prime)
        return out

    def integers(self, residues):
        """Integers in [0, prime) of residues."""
        out = np.empty(residues.shape, np.uint64)
        kernels.integers(residues.reshape(-1), out.reshape(-1), self.prime)
        return out

    def reduced(self, integers):
        """Residues of integers of several words, low word first, shape (n, words)."""
        out = np.empty(len(integers))
        kernels.reduced(integers, out, self.prime)
        return out


_modulus = cache(Modulus)


def moduli(primes=PRIMES, degree=DEGREE):
    """The `Modulus` of each prime; each is made once."""
    return [_modulus(q, degree) for q in primes]


def multiplied(a, b, primes=PRIMES, out=None):
    """Products of transformed polynomials and one, added to `out`.

    Parameters
    ----------
    a, out : array, shape (..., primes, n)
    b : array, shape (primes, n)
    """
    out = np.zeros_like(a) if out is None else out
    several = (-1, *b.shape)
    kernels.multiply_add_each(
        out.reshape(several), a.reshape(several), b, np.array(primes, float)
    )
    return out


def uniform(stream, shape, primes=PRIMES, out=None):
    """Uniform residues, shape (*shape[:-1], primes, n), of a key stream.

    Whoever has the stream draws the same.
    """
    *outer, n = shape
    out = np.empty((*outer, len(primes), n)) if out is None else out
    for k, modulus in enumerate(moduli(primes, n)):
        out[..., k, :] = modulus.residues(below(stream, (*outer, n), modulus.prime))
    return out


def below(stream, shape, limit):
    """Uniform integers below a limit, of a key stream; what is not is drawn again."""
    mask = np.uint64((1 << (limit - 1).bit_length()) - 1)
    words = stream.words(shape)
    words &= mask
    flat = words.reshape(-1)
    bad = np.flatnonzero(flat >= limit)
    while len(bad):
        flat[bad] = stream.words(bad.shape) & mask
        bad = bad[flat[bad] >= limit]
    return words


def ternary(stream, n):
    """Uniform numbers of -1, 0 and 1."""
    return below(stream, (n,), 3).astype(np.int64) - 1


#: Coin tosses whose difference is an error; its variance is half of them.
TOSSES = 21


def errors(stream, shape):
    """Small errors: differences of the heads of two times `TOSSES` coins.

    Their standard deviation is 3.24, a little more than the 3.19 of the homomorphic
    encryption standard (Albrecht et al. 2018).
    """
    words = stream.words(shape)
    mask = np.uint64((1 << TOSSES) - 1)
    heads = np.bitwise_count(words & mask).astype(np.int64)
    return heads - np.bitwise_count(words >> np.uint64(TOSSES) & mask)


def small(integers, primes=PRIMES):
    """Residues of small signed integers, shape (..., primes, n)."""
    *outer, n = integers.shape
    out = np.empty((*outer, len(primes), n))
    out[...] = integers.astype(float)[..., None, :]
    return out


def _centered(x, q):
    return x - q if x > q // 2 else x


def _root(prime, degree):
    """The least root of which the n-th power is -1."""
    if (prime - 1) % (2 * degree):
        raise ValueError(f"modulo {prime} there is no root of -1 of order {2 * degree}")
    for x in range(2, 1000):
        root = pow(x, (prime - 1) // (2 * degree), prime)
        if pow(root, degree, prime) == prime - 1:
            break
    else:
        raise ValueError(f"{prime} is not prime")
    odd = _powers(root, prime, 2 * degree)[1::2]
    return int(np.where(odd < 0, odd + prime, odd).min())


def _powers(root, prime, count):
    """The first powers of a root, near zero; their count is a power of two."""
    powers, zero, known = np.ones(count), np.zeros(count), 1
    while known < count:
        step = float(_centered(pow(root, known, prime), prime))
        low, high = powers[:known], powers[known : 2 * known]
        kernels.scaled_difference(low, zero[:known], high, prime, step)
        known *= 2
    integers = np.empty(count, np.uint64)
    kernels.integers(powers, integers, prime)
    kernels.residues(integers, powers, prime)
    return powers


def _bits_reversed(n):
    """The numbers below a power of two in the order of their bits' mirror images."""
    order = np.zeros(1, np.int64)
    while len(order) < n:
        order = np.concatenate([2 * order, 2 * order + 1])
    return order


def _stage(powers, stage, run):
    """The roots of a stage, repeated where there are fewer than a run."""
    groups = 1 << stage
    return (
        np.resize(powers[groups : 2 * groups], run)
        if groups < run
        else (powers[groups : groups + run])
    )
