"""Arithmetic modulo 2**128: products, window sums and filters of packed arrays.

An element is two words, low word first, on a trailing axis of length 2. Sums of
any order are the same, so the result does not depend on the number of threads.
Shapes are checked here, because a mismatch would overrun memory. All loops run
without the GIL.
"""

import numpy as np

from cython.parallel cimport prange
from libc.stdint cimport int64_t, uint64_t

cdef extern from "ring128.h":
    ctypedef struct u128:
        pass
    u128 of_words(uint64_t low, uint64_t high) nogil
    void c_add(const u128 *a, const u128 *b, u128 *out, int64_t n) nogil
    void c_sub(const u128 *a, const u128 *b, u128 *out, int64_t n) nogil
    void c_neg(const u128 *a, u128 *out, int64_t n) nogil
    void c_mul(const u128 *a, const u128 *b, u128 *out, int64_t n) nogil
    void c_scale(const u128 *a, u128 c, u128 *out, int64_t n) nogil
    void c_join(u128 *hidden, const u128 *other, u128 *mask, int moving, int64_t n) nogil
    void c_addmul(const u128 *a, const u128 *b, u128 c, u128 *out, int64_t n) nogil
    void c_widen(const int64_t *a, u128 *out, int64_t n) nogil
    void c_decode(const u128 *a, double scale, double *out, int64_t n) nogil
    u128 c_dot(const u128 *a, const u128 *b, int64_t n) nogil
    void c_shift(const u128 *a, u128 offset, int64_t bits, int64_t minus, u128 *out,
                 int64_t n) nogil
    int64_t c_encode(const double *x, double scale, double limit, u128 *out,
                     int64_t n) nogil
    void c_box(const u128 *x, int64_t n, int64_t inner, int64_t radius, int64_t first,
               int64_t count, u128 *out) nogil
    void c_filter(const uint64_t *x, const int64_t *first, const int *weights,
                  int64_t taps, int64_t count, int64_t width, uint64_t *out) nogil

include "dispatch.pxi"

BITS = 128
WORDS = 2
#: The magnitudes of a filter's weights add up to less, so that sums of halves fit words.
MOST_WEIGHT = 1 << 31


cdef const u128* reading(const uint64_t[:, ::1] a) except? NULL:
    same(a.shape[1], 2)
    return <const u128 *>&a[0, 0] if a.shape[0] else NULL


cdef u128* writing(uint64_t[:, ::1] a) except? NULL:
    same(a.shape[1], 2)
    return <u128 *>&a[0, 0] if a.shape[0] else NULL


cdef u128 constant(c) except *:
    c = int(c) % (1 << 128)
    return of_words(c & 0xFFFFFFFFFFFFFFFF, c >> 64)


def add(const uint64_t[:, ::1] a, const uint64_t[:, ::1] b, uint64_t[:, ::1] out):
    """Elementwise ``a + b``."""
    same(a.shape[0], b.shape[0])
    same(a.shape[0], out.shape[0])
    cdef const u128 *p = reading(a)
    cdef const u128 *q = reading(b)
    cdef u128 *r = writing(out)
    with nogil:
        c_add(p, q, r, a.shape[0])


def sub(const uint64_t[:, ::1] a, const uint64_t[:, ::1] b, uint64_t[:, ::1] out):
    """Elementwise ``a - b``."""
    same(a.shape[0], b.shape[0])
    same(a.shape[0], out.shape[0])
    cdef const u128 *p = reading(a)
    cdef const u128 *q = reading(b)
    cdef u128 *r = writing(out)
    with nogil:
        c_sub(p, q, r, a.shape[0])


def join(uint64_t[:, ::1] hidden, const uint64_t[:, ::1] other, bint moving,
         uint64_t[:, ::1] mask):
    """Of both owners' hidden parts of numbers, what one of them multiplies and adds up.

    Parameters
    ----------
    hidden : array, shape (n, 2)
        this owner's part less its part of the mask; in its place comes the sum of both
        owners', and twice the mask.
    other : array, shape (n, 2)
        the other owner's part less its part of the mask.
    moving : bool
    mask : array, shape (n, 2)
        this owner's part of it. With `moving` the sum of both owners' hidden parts is
        added.
    """
    same(hidden.shape[0], other.shape[0])
    same(hidden.shape[0], mask.shape[0])
    cdef u128 *h = writing(hidden)
    cdef const u128 *o = reading(other)
    cdef u128 *m = writing(mask)
    with nogil:
        c_join(h, o, m, moving, hidden.shape[0])


def neg(const uint64_t[:, ::1] a, uint64_t[:, ::1] out):
    """Elementwise ``-a``."""
    same(a.shape[0], out.shape[0])
    cdef const u128 *p = reading(a)
    cdef u128 *r = writing(out)
    with nogil:
        c_neg(p, r, a.shape[0])


def mul(const uint64_t[:, ::1] a, const uint64_t[:, ::1] b, uint64_t[:, ::1] out):
    """Elementwise ``a * b``."""
    same(a.shape[0], b.shape[0])
    same(a.shape[0], out.shape[0])
    cdef const u128 *p = reading(a)
    cdef const u128 *q = reading(b)
    cdef u128 *r = writing(out)
    with nogil:
        c_mul(p, q, r, a.shape[0])


def scale(const uint64_t[:, ::1] a, c, uint64_t[:, ::1] out):
    """Elementwise ``c * a`` with an integer c."""
    same(a.shape[0], out.shape[0])
    cdef const u128 *p = reading(a)
    cdef u128 *r = writing(out)
    cdef u128 factor = constant(c)
    with nogil:
        c_scale(p, factor, r, a.shape[0])


def addmul(const uint64_t[:, ::1] a, const uint64_t[:, ::1] b, c,
           uint64_t[:, ::1] out):
    """Add ``c * a * b``, elementwise with an integer c, to `out`."""
    same(a.shape[0], b.shape[0])
    same(a.shape[0], out.shape[0])
    cdef const u128 *p = reading(a)
    cdef const u128 *q = reading(b)
    cdef u128 *r = writing(out)
    cdef u128 factor = constant(c)
    with nogil:
        c_addmul(p, q, factor, r, a.shape[0])


def shift(const uint64_t[:, ::1] a, offset, int bits, bint minus, uint64_t[:, ::1] out):
    """Drop low bits of one owner's part of a sum.

    ``((a + offset) >> bits) - (offset >> bits)``, or with `minus` ``-(-a >> bits)``.
    """
    same(a.shape[0], out.shape[0])
    if not 0 <= bits < 128:
        raise ValueError(f"there are no {bits} bits to drop")
    cdef const u128 *p = reading(a)
    cdef u128 *r = writing(out)
    cdef u128 c = constant(offset)
    with nogil:
        c_shift(p, c, bits, minus, r, a.shape[0])


def dot(const uint64_t[:, ::1] a, const uint64_t[:, ::1] b, uint64_t[:, ::1] out):
    """Sum of products; `out` is one element."""
    same(a.shape[0], b.shape[0])
    same(out.shape[0], 1)
    cdef const u128 *p = reading(a)
    cdef const u128 *q = reading(b)
    cdef u128 *r = writing(out)
    with nogil:
        r[0] = c_dot(p, q, a.shape[0])


def encode_int(const int64_t[::1] a, uint64_t[:, ::1] out):
    """Elements of signed integers."""
    same(a.shape[0], out.shape[0])
    cdef u128 *r = writing(out)
    if a.shape[0]:
        with nogil:
            c_widen(&a[0], r, a.shape[0])


def encode(const double[::1] x, double scale, double limit, uint64_t[:, ::1] out):
    """Elements nearest to ``x * scale``.

    Returns the index of the first number that is not finite or whose scaled
    magnitude exceeds `limit`, or -1.
    """
    same(x.shape[0], out.shape[0])
    cdef u128 *r = writing(out)
    cdef int64_t bad = -1
    if x.shape[0]:
        with nogil:
            bad = c_encode(&x[0], scale, limit, r, x.shape[0])
    return bad


def decode(const uint64_t[:, ::1] a, double scale, double[::1] out):
    """Real numbers ``a / scale``; elements from 2**127 are negative."""
    same(a.shape[0], out.shape[0])
    cdef const u128 *p = reading(a)
    if a.shape[0]:
        with nogil:
            c_decode(p, scale, &out[0], a.shape[0])


def box(const uint64_t[:, :, ::1] x, Py_ssize_t radius, Py_ssize_t first,
        uint64_t[:, :, ::1] out, int threads=1):
    """Sums over windows of ``2 * radius + 1`` elements along one axis.

    Parameters
    ----------
    x : array, shape (outer, n, 2 * inner)
    radius : int
    first : int
        centre of the first window; windows are cut off at the borders.
    out : array, shape (outer, count, 2 * inner)
    threads : int, optional
        the outer index is divided among so many threads.
    """
    cdef Py_ssize_t outer = x.shape[0], n = x.shape[1], count = out.shape[1], i
    cdef Py_ssize_t inner = x.shape[2] // 2
    same(outer, out.shape[0])
    same(2 * inner, x.shape[2])
    same(2 * inner, out.shape[2])
    if radius < 0 or first < 0 or first > n - count:
        raise ValueError("windows lie outside the array")
    radius = min(radius, n)
    if outer == 0 or count == 0 or inner == 0:
        return
    for i in prange(outer, nogil=True, num_threads=threads, schedule="static"):
        c_box(<const u128 *>&x[i, 0, 0], n, inner, radius, first, count,
              <u128 *>&out[i, 0, 0])


def filter_axis(const uint64_t[:, :, ::1] x, const int64_t[::1] first,
                const int[:, ::1] weights, uint64_t[:, :, ::1] out,
                int threads=1):
    """Weighted sums of neighbours along one axis.

    Parameters
    ----------
    x : array, shape (outer, n, 2 * inner)
    first : array of int64, shape (count,)
        index along the axis of each sum's first term.
    weights : array of int32, shape (count, taps)
        the magnitudes of each row's weights add up to less than `MOST_WEIGHT`.
    out : array, shape (outer, count, 2 * inner)
    threads : int, optional
    """
    cdef Py_ssize_t outer = x.shape[0], n = x.shape[1], count = out.shape[1], i
    cdef Py_ssize_t taps = weights.shape[1], width = x.shape[2]
    same(outer, out.shape[0])
    same(width, out.shape[2])
    same(width % 2, 0)
    same(count, first.shape[0])
    same(count, weights.shape[0])
    if outer == 0 or count == 0 or width == 0:
        return
    if taps == 0 or np.abs(weights, dtype=np.int64).sum(axis=1).max() >= MOST_WEIGHT:
        raise ValueError("the filter has no weights or too large ones")
    if np.min(first) < 0 or np.max(first) > n - taps:
        raise ValueError("the filter reaches outside the array")
    for i in prange(outer, nogil=True, num_threads=threads, schedule="static"):
        c_filter(&x[i, 0, 0], &first[0], &weights[0, 0], taps, count, width,
                 &out[i, 0, 0])
