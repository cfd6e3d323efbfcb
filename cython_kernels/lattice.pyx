"""Polynomials modulo X^n + 1 and primes below 2**50, for encryption by lattices.

A residue is a double that holds an integer, near zero. Callers validate: n is a power
of two of at least 32, q is prime with 2 n a divisor of q - 1, arrays belong together.
All loops run without the GIL.
"""

import numpy as np

from libc.stdint cimport int64_t, uint8_t, uint64_t

cdef extern from "lattice.h":
    int64_t transform(double *, double *, const double *, int64_t,
                      double) noexcept nogil
    int64_t untransform(double *, double *, const double *, int64_t, double,
                        double) noexcept nogil
    int64_t c_multiply_add "multiply_add"(double *, const double *, const double *,
                                          int64_t, double) noexcept nogil
    int64_t c_scaled_difference "scaled_difference"(
        const double *, const double *, double *, int64_t, double,
        double) noexcept nogil
    int64_t c_residues "residues"(const uint64_t *, double *, int64_t,
                                  double) noexcept nogil
    int64_t c_integers "integers"(const double *, uint64_t *, int64_t,
                                  double) noexcept nogil
    int64_t c_packed "packed"(const double *, uint8_t *, int64_t,
                              double) noexcept nogil
    int64_t c_unpacked "unpacked"(const uint8_t *, double *, int64_t,
                                  double) noexcept nogil
    int64_t c_reduced "reduced"(const uint64_t *, int64_t, double *, int64_t,
                                double) noexcept nogil
    int64_t c_raised "raised"(const uint64_t *, double *, int64_t, double, double,
                              double, double) noexcept nogil
    int64_t c_lowered "lowered"(const double *, double *, double *, int64_t, double,
                                double) noexcept nogil
    int64_t run_of(int64_t, int64_t) noexcept nogil
    int SENT

include "dispatch.pxi"

#: Bytes of a number as it is sent.
SENT_BYTES = SENT


def runs(Py_ssize_t n):
    """How many roots each stage of a transform of length n takes, the first first."""
    return [run_of(1 << s, n // 2) for s in range(n.bit_length() - 1)]


cdef Py_ssize_t all_runs(Py_ssize_t n):
    """How many roots all stages take."""
    cdef Py_ssize_t groups = 1, out = 0
    while groups < n:
        out += run_of(groups, n // 2)
        groups *= 2
    return out


def forward(double[:, ::1] a, const double[::1] roots, double q):
    """Values of polynomials at the odd powers of a root of -1, in their place."""
    cdef Py_ssize_t k
    cdef double[::1] work = np.empty(a.shape[1])
    same(roots.shape[0], all_runs(a.shape[1]))
    with nogil:
        for k in range(a.shape[0]):
            transform(&a[k, 0], &work[0], &roots[0], a.shape[1], q)


def backward(double[:, ::1] a, const double[::1] roots, double q, double scale):
    """The polynomials of such values, times a constant, in their place."""
    cdef Py_ssize_t k
    cdef double[::1] work = np.empty(a.shape[1])
    same(roots.shape[0], all_runs(a.shape[1]))
    with nogil:
        for k in range(a.shape[0]):
            untransform(&a[k, 0], &work[0], &roots[0], a.shape[1], q, scale)


def multiply_add(double[::1] acc, const double[::1] a, const double[::1] b, double q):
    """Add products, elementwise."""
    same(acc.shape[0], a.shape[0])
    same(acc.shape[0], b.shape[0])
    with nogil:
        c_multiply_add(&acc[0], &a[0], &b[0], a.shape[0], q)


def multiply_add_each(double[:, :, ::1] acc, const double[:, :, ::1] a,
                      const double[:, ::1] b, const double[::1] primes):
    """The same for several polynomials times one, modulo each of some primes.

    Shapes (several, primes, n) and (primes, n).
    """
    cdef Py_ssize_t j, k
    same(acc.shape[0], a.shape[0])
    same(primes.shape[0], a.shape[1])
    same(primes.shape[0], acc.shape[1])
    same(primes.shape[0], b.shape[0])
    same(acc.shape[2], a.shape[2])
    same(acc.shape[2], b.shape[1])
    with nogil:
        for k in range(a.shape[1]):
            for j in range(a.shape[0]):
                c_multiply_add(&acc[j, k, 0], &a[j, k, 0], &b[k, 0], a.shape[2],
                               primes[k])


def scaled_difference(const double[::1] a, const double[::1] b, double[::1] out,
                      double q, double constant):
    """``(a - b) * constant``, elementwise."""
    same(out.shape[0], a.shape[0])
    same(out.shape[0], b.shape[0])
    with nogil:
        c_scaled_difference(&a[0], &b[0], &out[0], a.shape[0], q, constant)


def residues(const uint64_t[::1] x, double[::1] out, double q):
    """Residues of integers in [0, q)."""
    same(out.shape[0], x.shape[0])
    with nogil:
        c_residues(&x[0], &out[0], x.shape[0], q)


def integers(const double[::1] x, uint64_t[::1] out, double q):
    """Integers in [0, q) of residues of magnitude below 2**52; q may be any number."""
    same(out.shape[0], x.shape[0])
    with nogil:
        c_integers(&x[0], &out[0], x.shape[0], q)


def packed(const double[::1] x, uint8_t[:, ::1] out, double q):
    """Integers in [0, q) of residues as they are sent, in `SENT` bytes each."""
    same(out.shape[0], x.shape[0])
    same(out.shape[1], SENT)
    with nogil:
        c_packed(&x[0], &out[0, 0], x.shape[0], q)


def unpacked(const uint8_t[:, ::1] x, double[::1] out, double q):
    """Residues of what was sent; how many of the integers are not below q."""
    cdef int64_t wrong
    same(out.shape[0], x.shape[0])
    same(x.shape[1], SENT)
    with nogil:
        wrong = c_unpacked(&x[0, 0], &out[0], x.shape[0], q)
    return wrong


def reduced(const uint64_t[:, ::1] x, double[::1] out, double q):
    """Residues of integers of several words, low word first; q is above 2**32."""
    same(out.shape[0], x.shape[0])
    with nogil:
        c_reduced(&x[0, 0], x.shape[1], &out[0], x.shape[0], q)


def raised(const uint64_t[::1] m, double[::1] out, double t, double modulus_by_t,
           double q, double inverse_t):
    """Add residues of the integers nearest to Q m / t, halves rounded up.

    Q is a multiple of the prime q and `modulus_by_t` modulo t; `inverse_t` is the
    inverse of t modulo q; m is below t and t below 2**50.
    """
    same(out.shape[0], m.shape[0])
    with nogil:
        c_raised(&m[0], &out[0], m.shape[0], t, modulus_by_t, q, inverse_t)


def lowered(const double[::1] y, double[::1] whole, double[::1] fractions, double t,
            double q):
    """Add the integers nearest to t y / q to some numbers, what is left to others.

    y is near zero, t below 2**50 and below 2 q.
    """
    same(whole.shape[0], y.shape[0])
    same(fractions.shape[0], y.shape[0])
    with nogil:
        c_lowered(&y[0], &whole[0], &fractions[0], y.shape[0], t, q)
