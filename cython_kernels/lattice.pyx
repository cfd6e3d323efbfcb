"""Polynomials modulo X^n + 1 and primes below 2**50, for encryption by lattices.

A residue is a double that holds an integer, near zero. Callers validate: n is a power
of two of at least 32, q is prime with 2 n a divisor of q - 1, arrays belong together.
All loops run without the GIL.
"""

import numpy as np

from libc.stdint cimport int64_t, uint64_t

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
    void c_residues "residues"(const uint64_t *, double *, int64_t,
                               uint64_t) noexcept nogil
    void c_integers "integers"(const double *, uint64_t *, int64_t,
                               uint64_t) noexcept nogil
    void c_reduced "reduced"(const uint64_t *, int64_t, double *, int64_t,
                             uint64_t) noexcept nogil
    void c_raised "raised"(const uint64_t *, double *, int64_t, uint64_t, uint64_t,
                           uint64_t, uint64_t) noexcept nogil
    void c_lowered "lowered"(const uint64_t *, uint64_t *, double *, int64_t, uint64_t,
                             uint64_t) noexcept nogil
    int RUN

include "dispatch.pxi"


def runs(Py_ssize_t n):
    """How many roots each stage of a transform of length n takes, the first first."""
    return [min(max(1 << s, RUN), n // 2) for s in range(n.bit_length() - 1)]


def forward(double[:, ::1] a, const double[::1] roots, double q):
    """Values of polynomials at the odd powers of a root of -1, in their place."""
    cdef Py_ssize_t k
    cdef double[::1] work = np.empty(a.shape[1])
    same(roots.shape[0], sum(runs(a.shape[1])))
    with nogil:
        for k in range(a.shape[0]):
            transform(&a[k, 0], &work[0], &roots[0], a.shape[1], q)


def backward(double[:, ::1] a, const double[::1] roots, double q, double scale):
    """The polynomials of such values, times a constant, in their place."""
    cdef Py_ssize_t k
    cdef double[::1] work = np.empty(a.shape[1])
    same(roots.shape[0], sum(runs(a.shape[1])))
    with nogil:
        for k in range(a.shape[0]):
            untransform(&a[k, 0], &work[0], &roots[0], a.shape[1], q, scale)


def multiply_add(double[::1] acc, const double[::1] a, const double[::1] b, double q):
    """Add products, elementwise."""
    same(acc.shape[0], a.shape[0])
    same(acc.shape[0], b.shape[0])
    with nogil:
        c_multiply_add(&acc[0], &a[0], &b[0], a.shape[0], q)


def scaled_difference(const double[::1] a, const double[::1] b, double[::1] out,
                      double q, double constant):
    """``(a - b) * constant``, elementwise."""
    same(out.shape[0], a.shape[0])
    same(out.shape[0], b.shape[0])
    with nogil:
        c_scaled_difference(&a[0], &b[0], &out[0], a.shape[0], q, constant)


def residues(const uint64_t[::1] x, double[::1] out, uint64_t q):
    """Residues of integers in [0, q)."""
    same(out.shape[0], x.shape[0])
    with nogil:
        c_residues(&x[0], &out[0], x.shape[0], q)


def integers(const double[::1] x, uint64_t[::1] out, uint64_t q):
    """Integers in [0, q) of residues."""
    same(out.shape[0], x.shape[0])
    with nogil:
        c_integers(&x[0], &out[0], x.shape[0], q)


def reduced(const uint64_t[:, ::1] x, double[::1] out, uint64_t q):
    """Residues of integers of several words, low word first."""
    same(out.shape[0], x.shape[0])
    with nogil:
        c_reduced(&x[0, 0], x.shape[1], &out[0], x.shape[0], q)


def raised(const uint64_t[::1] m, double[::1] out, uint64_t t, uint64_t modulus_by_t,
           uint64_t q, uint64_t inverse_t):
    """Residues of the integers nearest to Q m / t.

    Q is a multiple of the prime q and `modulus_by_t` modulo t; `inverse_t` is the
    inverse of t modulo q.
    """
    same(out.shape[0], m.shape[0])
    with nogil:
        c_raised(&m[0], &out[0], m.shape[0], t, modulus_by_t, q, inverse_t)


def lowered(const uint64_t[::1] y, uint64_t[::1] words, double[::1] fractions,
            uint64_t t, uint64_t q):
    """Add the whole part of t y / q to words, modulo t, and what is left to others."""
    same(words.shape[0], y.shape[0])
    same(fractions.shape[0], y.shape[0])
    with nogil:
        c_lowered(&y[0], &words[0], &fractions[0], y.shape[0], t, q)
