"""The two prime fields, the rings of 32, 64 and 128 bits, and their packed arrays.

An element of GF(2^61 - 1) is one 64-bit word; an element of GF(2^127 - 1) is
two, low word first, on a trailing axis of length 2. Any word of 32 or 64 bits is an
element of the ring of integers modulo 2^32 or 2^64, any two words of 64 bits of that
modulo 2^128. All bulk arithmetic runs in the Cython kernels: this module gives them
names, shapes and checks.
"""

import numpy as np

from dipy_ppir._kernels import field61, field127, ring32, ring64, ring128
from dipy_ppir.mpc.errors import FixedPointOverflowError


class Field:
    """A Mersenne prime field and its packed arrays.

    Parameters
    ----------
    kernels : module
        the compiled kernels of the field.

    Attributes
    ----------
    bits : int
        the field has p = 2**bits - 1 elements.
    modulus : int
        p.
    words : int
        64-bit words per element.
    weights : tuple of int
        a secret is the sum of these times the parties' shares of degree 2: the
        Lagrange coefficients at 0 for the points 1, 2 and 3.
    """

    weights = (3, -3, 1)
    dtype = np.uint64

    def __init__(self, kernels):
        self.kernels = kernels
        self.bits = kernels.BITS
        self.words = kernels.WORDS
        self.modulus = (1 << self.bits) - 1

    def __repr__(self):
        return f"GF(2^{self.bits} - 1)"

    @property
    def nbytes(self):
        """Bytes per element."""
        return np.dtype(self.dtype).itemsize * self.words

    def storage(self, shape):
        """Shape of the uint64 array that packs elements of `shape`."""
        shape = tuple(shape)
        return shape if self.words == 1 else shape + (self.words,)

    def empty(self, shape):
        """An uninitialised packed array."""
        return np.empty(self.storage(shape), dtype=self.dtype)

    def zeros(self, shape):
        """A packed array of zeros."""
        return np.zeros(self.storage(shape), dtype=self.dtype)

    def flat(self, a):
        """One-dimensional view of a packed array, for the kernels."""
        return a.reshape(self.storage((-1,)))

    def reduce_random(self, a):
        """Mask random words in place; return how many elements to reject."""
        return self.kernels.reduce_random(self.flat(a))

    def replace_rejected(self, a, spare):
        """Replace rejected elements by `spare`; return how many it could."""
        before = self.count_rejected(a)
        self.kernels.replace_rejected(self.flat(a), self.flat(spare))
        return before - self.count_rejected(a)

    def count_rejected(self, a):
        """How many entries equal p, the one non-canonical masked word."""
        words = self.flat(a)
        if self.words == 1:
            return int(np.count_nonzero(words == self.modulus))
        low, high = (self.modulus >> s & (1 << 64) - 1 for s in (0, 64))
        return int(np.count_nonzero((words[:, 0] == low) & (words[:, 1] == high)))

    def is_canonical(self, a):
        """Whether every entry is in [0, p)."""
        return bool(self.kernels.is_canonical(self.flat(a)))

    def _binary(self, kernel, a, b):
        out = np.empty_like(a)
        kernel(self.flat(a), self.flat(b), self.flat(out))
        return out

    def add(self, a, b):
        """Elementwise sum of packed arrays of one shape."""
        return self._binary(self.kernels.add, a, b)

    def sub(self, a, b):
        """Elementwise difference."""
        return self._binary(self.kernels.sub, a, b)

    def mul(self, a, b):
        """Elementwise product."""
        return self._binary(self.kernels.mul, a, b)

    def neg(self, a):
        """Elementwise negation."""
        out = np.empty_like(a)
        self.kernels.neg(self.flat(a), self.flat(out))
        return out

    def scale(self, a, constant):
        """Product with a public integer (or a residue, for example 1/2)."""
        out = np.empty_like(a)
        self.kernels.scale(self.flat(a), constant % self.modulus, self.flat(out))
        return out

    def axpby(self, alpha, a, beta, b):
        """``alpha * a + beta * b`` with public integers alpha and beta."""
        out = np.empty_like(a)
        self.kernels.axpby(
            alpha % self.modulus,
            self.flat(a),
            beta % self.modulus,
            self.flat(b),
            self.flat(out),
        )
        return out

    def matmul(self, a, b):
        """Matrix product of packed arrays, shapes (n, k) and (k, m)."""
        out = self.empty((a.shape[0], b.shape[1]))
        self.kernels.matmul(a, b, out)
        return out

    def inverse(self, integer):
        """Inverse of a public integer."""
        return pow(integer, -1, self.modulus)

    def encode(self, x, frac_bits, bound):
        """Fixed-point elements nearest to real numbers.

        Parameters
        ----------
        x : array of float
            the numbers, any shape.
        frac_bits : int
            an element stands for ``x * 2**frac_bits``, rounded to nearest.
        bound : float
            largest magnitude that x may have.

        Returns
        -------
        elements : array of uint64, shape ``storage(x.shape)``

        Raises
        ------
        FixedPointOverflowError
            if a number is not finite or larger than `bound`.
        """
        x = np.ascontiguousarray(x, dtype=np.float64)
        out = self.empty(x.shape)
        scale = 2.0**frac_bits
        # Below half the modulus, whatever is left of the difference in a double.
        limit = min(bound * scale + 0.5, np.nextafter(2.0 ** (self.bits - 1) - 1, 0))
        if not self._encode(x.reshape(-1), scale, limit, self.flat(out)):
            raise FixedPointOverflowError(
                "a value to be shared is not finite or exceeds its declared "
                f"bound of {bound:g}; check the images for NaN or infinite voxels"
            )
        return out

    def _encode(self, x, scale, limit, out):
        return self.kernels.encode(x, scale, limit, out) < 0

    def decode(self, a, frac_bits):
        """Real numbers of fixed-point elements; above p/2 means negative."""
        shape = a.shape if self.words == 1 else a.shape[:-1]
        out = np.empty(shape, dtype=np.float64)
        self.kernels.decode(self.flat(a), 2.0**frac_bits, out.reshape(-1))
        return out

    def encode_int(self, x):
        """Elements of signed integers."""
        x = np.ascontiguousarray(x, dtype=np.int64)
        out = self.empty(x.shape)
        self.kernels.encode_int(x.reshape(-1), self.flat(out))
        return out

    def from_ints(self, values):
        """Packed array of a (nested) sequence of Python integers, any size."""
        values = np.asarray(values, dtype=object)
        out = self.empty(values.shape)
        flat = self.flat(out).reshape(-1, self.words)
        for i, v in enumerate(values.reshape(-1)):
            v = int(v) % self.modulus
            for w in range(self.words):
                flat[i, w] = v >> 64 * w & (1 << 64) - 1
        return out

    def to_ints(self, a):
        """Object array of Python integers in [0, p); the way to MPyC."""
        shape = a.shape if self.words == 1 else a.shape[:-1]
        flat = a.reshape(-1, self.words)
        ints = np.empty(len(flat), dtype=object)
        for i, row in enumerate(flat):
            ints[i] = sum(int(w) << 64 * k for k, w in enumerate(row))
        return ints.reshape(shape)


class Ring(Field):
    """Integers modulo 2**128; `WordRing` has fewer.

    It has no Shamir shares. A secret is the plain sum of three elements, one of each
    party, which stands where a field has shares of degree 2.
    """

    weights = (1, 1, 1)

    def __init__(self, kernels):
        super().__init__(kernels)
        self.modulus = 1 << self.bits

    def __repr__(self):
        return f"Z/2^{self.bits}"

    def reduce_random(self, a):
        """Every word is an element: reject none."""
        return 0

    def count_rejected(self, a):
        """None."""
        return 0

    def is_canonical(self, a):
        """Every word is an element."""
        return True

    def axpby(self, alpha, a, beta, b):
        """``alpha * a + beta * b`` with public integers alpha and beta."""
        return self.add(self.scale(a, alpha), self.scale(b, beta))

    def addmul(self, out, a, b, c=1):
        """Add ``c * a * b``, elementwise with a public integer c, to `out`."""
        self.kernels.addmul(self.flat(a), self.flat(b), c, self.flat(out))

    def dot(self, a, b):
        """Sum of products of packed arrays; one element."""
        out = self.empty((1,))
        self.kernels.dot(self.flat(a), self.flat(b), out)
        return out


class WordRing(Ring):
    """Integers modulo 2**32 or 2**64, whose arithmetic is the processor's own.

    Products of rows are several times faster here than in a field (see
    `contingency`).
    """

    def __init__(self, kernels):
        super().__init__(kernels)
        self.dtype, self.signed = {
            32: (np.uint32, np.int32),
            64: (np.uint64, np.int64),
        }[self.bits]

    def add(self, a, b):
        """Elementwise sum of arrays of one shape."""
        return np.add(a, b, out=np.empty_like(a))

    def sub(self, a, b):
        """Elementwise difference."""
        return np.subtract(a, b, out=np.empty_like(a))

    def mul(self, a, b):
        """Elementwise product."""
        return np.multiply(a, b, out=np.empty_like(a))

    def neg(self, a):
        """Elementwise negation."""
        return np.negative(a, out=np.empty_like(a))

    def scale(self, a, constant):
        """Product with a public integer."""
        factor = self.dtype(constant % self.modulus)
        return np.multiply(a, factor, out=np.empty_like(a))

    def addmul(self, out, a, b, c=1):
        """Add ``c * a * b``, elementwise with a public integer c, to `out`."""
        product = a * b
        if c != 1:
            product *= self.dtype(c % self.modulus)
        out += product

    def dot(self, a, b):
        """Sum of products; one element."""
        return np.array([np.dot(a.reshape(-1), b.reshape(-1))], dtype=self.dtype)

    def matmul(self, a, b):
        """Matrix product; for small matrices."""
        return a @ b

    def _encode(self, x, scale, limit, out):
        return self.kernels.encode(x, scale, limit, out)

    def decode(self, a, frac_bits):
        """Real numbers of fixed-point elements; in the upper half negative."""
        return a.view(self.signed) / 2.0**frac_bits

    def encode_int(self, x):
        """Elements of signed integers."""
        return np.asarray(x, dtype=np.int64).astype(self.dtype, order="C")


P61 = Field(field61)
P127 = Field(field127)
R32 = WordRing(ring32)
R64 = WordRing(ring64)
R128 = Ring(ring128)
