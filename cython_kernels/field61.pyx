"""Arithmetic modulo the Mersenne prime 2**61 - 1.

An element is one ``uint64`` in ``[0, p)``. Every function expects canonical
inputs unless it says otherwise and leaves canonical outputs. Shapes are checked
here, because a mismatch would overrun memory; value ranges are the caller's
business. All loops run without the GIL.

The loops are C, compiled once per instruction set and chosen when the module is
imported, so that one wheel serves old and new processors.
"""

from libc.stdint cimport int64_t, uint64_t

cdef extern from "field61.h":
    int64_t c_reduce_random(uint64_t *, int64_t) noexcept nogil
    int64_t c_replace_rejected(uint64_t *, int64_t, const uint64_t *, int64_t) noexcept nogil
    int64_t c_is_canonical(const uint64_t *, int64_t) noexcept nogil
    int64_t c_add(const uint64_t *, const uint64_t *, uint64_t *, int64_t) noexcept nogil
    int64_t c_sub(const uint64_t *, const uint64_t *, uint64_t *, int64_t) noexcept nogil
    int64_t c_mul(const uint64_t *, const uint64_t *, uint64_t *, int64_t) noexcept nogil
    int64_t c_neg(const uint64_t *, uint64_t *, int64_t) noexcept nogil
    int64_t c_scale(const uint64_t *, uint64_t, uint64_t *, int64_t) noexcept nogil
    int64_t c_axpby(uint64_t, const uint64_t *, uint64_t, const uint64_t *, uint64_t *, int64_t) noexcept nogil
    int64_t c_encode(const double *, double, double, uint64_t *, int64_t) noexcept nogil
    int64_t c_decode(const uint64_t *, double, double *, int64_t) noexcept nogil
    int64_t c_encode_int(const int64_t *, uint64_t *, int64_t) noexcept nogil
    void c_matmul(const uint64_t *, const uint64_t *, uint64_t *, int64_t, int64_t, int64_t) noexcept nogil


BITS = 61
WORDS = 1
cdef object P = (1 << 61) - 1

include "dispatch.pxi"


def reduce_random(uint64_t[::1] a):
    """Keep the low 61 bits of uniformly random words, in place.

    Parameters
    ----------
    a : uint64 array, shape (n,)
        Any words.

    Returns
    -------
    int
        How many elements now equal p and must be replaced.
    """
    cdef int64_t n = a.shape[0], rejected
    if n == 0:
        return 0
    with nogil:
        rejected = c_reduce_random(&a[0], n)
    return rejected


def replace_rejected(uint64_t[::1] a, const uint64_t[::1] spare):
    """Replace, in order and in place, the elements equal to p by spare random words.

    Parameters
    ----------
    a : uint64 array, shape (n,)
        Words already masked by `reduce_random`.
    spare : uint64 array, shape (m,)
        More random words, unmasked.

    Returns
    -------
    int
        Number of spare words consumed, -1 if they ran out.
    """
    cdef int64_t n = a.shape[0], m = spare.shape[0], used
    if n == 0:
        return 0
    with nogil:
        used = c_replace_rejected(&a[0], n, &spare[0] if m else NULL, m)
    return used


def is_canonical(const uint64_t[::1] a):
    """Tell whether every element of `a`, shape (n,), is below p."""
    cdef int64_t n = a.shape[0], good
    if n == 0:
        return True
    with nogil:
        good = c_is_canonical(&a[0], n)
    return bool(good)


def add(const uint64_t[::1] a, const uint64_t[::1] b, uint64_t[::1] out):
    """Write a + b to `out`; all of shape (n,), `out` may be an input."""
    cdef int64_t n = out.shape[0]
    same(a.shape[0], n)
    same(b.shape[0], n)
    if n:
        with nogil:
            c_add(&a[0], &b[0], &out[0], n)


def sub(const uint64_t[::1] a, const uint64_t[::1] b, uint64_t[::1] out):
    """Write a - b to `out`; all of shape (n,), `out` may be an input."""
    cdef int64_t n = out.shape[0]
    same(a.shape[0], n)
    same(b.shape[0], n)
    if n:
        with nogil:
            c_sub(&a[0], &b[0], &out[0], n)


def mul(const uint64_t[::1] a, const uint64_t[::1] b, uint64_t[::1] out):
    """Write the elementwise product to `out`; all of shape (n,), `out` may be an input."""
    cdef int64_t n = out.shape[0]
    same(a.shape[0], n)
    same(b.shape[0], n)
    if n:
        with nogil:
            c_mul(&a[0], &b[0], &out[0], n)


def neg(const uint64_t[::1] a, uint64_t[::1] out):
    """Write -a to `out`; both of shape (n,), possibly the same array."""
    cdef int64_t n = out.shape[0]
    same(a.shape[0], n)
    if n:
        with nogil:
            c_neg(&a[0], &out[0], n)


def scale(const uint64_t[::1] a, c, uint64_t[::1] out):
    """Write c * a to `out` for the public integer `c`; arrays of shape (n,)."""
    cdef int64_t n = out.shape[0]
    cdef uint64_t factor = c % P
    same(a.shape[0], n)
    if n:
        with nogil:
            c_scale(&a[0], factor, &out[0], n)


def axpby(alpha, const uint64_t[::1] a, beta, const uint64_t[::1] b, uint64_t[::1] out):
    """Write alpha * a + beta * b to `out`.

    Parameters
    ----------
    alpha, beta : int
        Public constants, reduced modulo p here.
    a, b, out : uint64 array, shape (n,)
        `out` may be an input.
    """
    cdef int64_t n = out.shape[0]
    cdef uint64_t ca = alpha % P, cb = beta % P
    same(a.shape[0], n)
    same(b.shape[0], n)
    if n:
        with nogil:
            c_axpby(ca, &a[0], cb, &b[0], &out[0], n)


def encode(const double[::1] x, double scale, double bound, uint64_t[::1] out):
    """Encode reals as fixed-point field elements, rounding half to even.

    Parameters
    ----------
    x : float64 array, shape (n,)
    scale : float
        Power of two that multiplies `x`.
    bound : float
        Largest magnitude allowed after rounding; held below 2**60 in any case.
    out : uint64 array, shape (n,)
        Filled up to the first offender.

    Returns
    -------
    int
        -1, or the index of the first element that is not finite or too large.
    """
    cdef int64_t n = out.shape[0], where = -1
    same(x.shape[0], n)
    if n:
        with nogil:
            where = c_encode(&x[0], scale, bound, &out[0], n)
    return where


def decode(const uint64_t[::1] a, double scale, double[::1] out):
    """Write a / scale to `out` as reals, elements above p/2 being negative.

    Parameters
    ----------
    a : uint64 array, shape (n,)
    scale : float
    out : float64 array, shape (n,)
        Rounded to nearest when 53 bits do not suffice.
    """
    cdef int64_t n = out.shape[0]
    same(a.shape[0], n)
    if n:
        with nogil:
            c_decode(&a[0], scale, &out[0], n)


def encode_int(const int64_t[::1] x, uint64_t[::1] out):
    """Write signed integers, any int64, to `out` modulo p; both of shape (n,)."""
    cdef int64_t n = out.shape[0]
    same(x.shape[0], n)
    if n:
        with nogil:
            c_encode_int(&x[0], &out[0], n)


def matmul(const uint64_t[:, ::1] a, const uint64_t[:, ::1] b, uint64_t[:, ::1] out):
    """Write the matrix product to `out`, which may not be an input.

    Parameters
    ----------
    a : uint64 array, shape (n, k)
    b : uint64 array, shape (k, m)
    out : uint64 array, shape (n, m)
    """
    cdef int64_t n = a.shape[0], k = a.shape[1], m = b.shape[1]
    same(b.shape[0], k)
    same(out.shape[0], n)
    same(out.shape[1], m)
    if n == 0 or m == 0:
        return
    if k == 0:
        out[:, :] = 0
        return
    with nogil:
        c_matmul(&a[0, 0], &b[0, 0], &out[0, 0], n, k, m)
