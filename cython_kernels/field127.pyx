"""Arithmetic modulo the Mersenne prime 2**127 - 1.

An element is two ``uint64``, low word first, on a trailing axis of length 2, and
lies in ``[0, p)``. Every function expects canonical inputs unless it says
otherwise and leaves canonical outputs. Shapes are checked here, because a
mismatch would overrun memory; value ranges are the caller's business. All loops
run without the GIL.

The loops are C, compiled once per instruction set and chosen when the module is
imported, so that one wheel serves old and new processors.
"""

from libc.stdint cimport int64_t, uint64_t

cdef extern from *:
    """
    #include <math.h>
    #include <stdint.h>
    #include "dispatch.h"

    #ifndef __SIZEOF_INT128__
    #error "the field kernels need a compiler with 128-bit integers (GCC or Clang)"
    #endif

    typedef unsigned __int128 u128;
    typedef __int128 i128;
    #define P127 ((((u128)1) << 127) - 1)
    #define TOP 0x7fffffffffffffffULL       /* the high word of p */

    /* ---- scalars ---------------------------------------------------------- */

    /* Words, not a 128-bit load: the arrays are aligned to 8 bytes only. */
    ALWAYS u128 load(const uint64_t *a) { return (u128)a[1] << 64 | a[0]; }
    ALWAYS void store(uint64_t *a, u128 x) { a[0] = (uint64_t)x; a[1] = (uint64_t)(x >> 64); }

    /* [0, 2p) -> [0, p); with a mask, since the branch would be a coin toss */
    ALWAYS u128 once(u128 x) {
        u128 y = x + 1;                      /* bit 127 set exactly when x >= p */
        return (x + (y >> 127)) & P127;
    }

    /* any u128 -> [0, p) */
    ALWAYS u128 fold(u128 x) { return once((x & P127) + (x >> 127)); }

    ALWAYS u128 add1(u128 a, u128 b) { return once(a + b); }
    ALWAYS u128 sub1(u128 a, u128 b) {
        u128 d = a - b;
        return (d - (d >> 127)) & P127;      /* a borrow wraps at 2^127 once taken off p */
    }
    ALWAYS u128 neg1(u128 a) { return sub1(0, a); }

    /* b is doubled to bring bit 127 of the product to a word boundary: shifts
       across words are slow */
    ALWAYS u128 mul1(u128 a, u128 b) {
        uint64_t a0 = (uint64_t)a, a1 = (uint64_t)(a >> 64), b0 = (uint64_t)b;
        uint64_t b1 = 2 * (uint64_t)(b >> 64) + (b0 >> 63);
        b0 += b0;
        u128 p = (u128)a0 * b0;
        u128 q = (u128)a1 * b0 + (p >> 64);
        u128 r = (u128)a0 * b1 + (uint64_t)q;
        u128 h = (u128)a1 * b1 + (q >> 64) + (r >> 64);
        uint64_t l0 = (uint64_t)p, l1 = (uint64_t)r;
        u128 l = (u128)(l1 >> 1) << 64 | ((l0 >> 1) + (l1 << 63));
        return once(l + h);
    }

    ALWAYS u128 from_signed(i128 v) { return (u128)v + (v < 0 ? P127 : 0); }

    /* A sum of products, kept as sums of 64-bit words so that no carry is ever
       lost: good for 2^60 terms. 2^128 = 2 brings the top product down to the
       weight of the bottom one. */
    typedef struct { u128 l0, l1, m0, m1; } lazy;

    ALWAYS void lazy_add(lazy *s, const uint64_t *a, const uint64_t *b) {
        u128 low = (u128)a[0] * b[0];
        u128 top = (u128)a[1] * (b[1] << 1);
        u128 mid = (u128)a[0] * b[1] + (u128)a[1] * b[0];
        s->l0 += (uint64_t)low;
        s->l1 += (uint64_t)(low >> 64);
        s->l0 += (uint64_t)top;
        s->l1 += (uint64_t)(top >> 64);
        s->m0 += (uint64_t)mid;
        s->m1 += (uint64_t)(mid >> 64);
    }

    ALWAYS u128 lazy_value(const lazy *s) {
        u128 t = s->l1 + s->m0;
        u128 x = fold(t << 64);
        x += s->l0 + 2 * s->m1 + 2 * (t >> 64);         /* all far below 2^100 */
        return fold(x);
    }

    /* ---- elementwise ------------------------------------------------------ */

    ALWAYS int64_t c_reduce_random_body(uint64_t *a, int64_t n) {
        uint64_t rejected = 0;
        for (int64_t i = 0; i < n; i++) {
            a[2 * i + 1] &= TOP;
            rejected += (uint64_t)((a[2 * i] & (a[2 * i + 1] | (TOP + 1))) == ~(uint64_t)0);
        }
        return (int64_t)rejected;
    }
    DISPATCH(c_reduce_random, (uint64_t *a, int64_t n), (a, n))

    static int64_t c_replace_rejected(uint64_t *a, int64_t n, const uint64_t *spare, int64_t m) {
        int64_t used = 0;
        for (int64_t i = 0; i < n; i++) {
            if (load(a + 2 * i) != P127) continue;
            u128 v = P127;
            while (v == P127) {
                if (used == m) return -1;
                v = load(spare + 2 * used++) & P127;
            }
            store(a + 2 * i, v);
        }
        return used;
    }

    ALWAYS int64_t c_is_canonical_body(const uint64_t *a, int64_t n) {
        uint64_t bad = 0;
        for (int64_t i = 0; i < n; i++) bad |= (uint64_t)(load(a + 2 * i) >= P127);
        return bad == 0;
    }
    DISPATCH(c_is_canonical, (const uint64_t *a, int64_t n), (a, n))

    #define BINARY(name, EXPR)                                                              \\
        ALWAYS int64_t name##_body(const uint64_t *a, const uint64_t *b, uint64_t *out, int64_t n) { \\
            for (int64_t i = 0; i < n; i++) {                                               \\
                u128 x = load(a + 2 * i), y = load(b + 2 * i);                              \\
                store(out + 2 * i, EXPR);                                                   \\
            }                                                                               \\
            return 0;                                                                       \\
        }                                                                                   \\
        DISPATCH(name, (const uint64_t *a, const uint64_t *b, uint64_t *out, int64_t n), (a, b, out, n))

    BINARY(c_add, add1(x, y))
    BINARY(c_sub, sub1(x, y))
    BINARY(c_mul, mul1(x, y))

    ALWAYS int64_t c_neg_body(const uint64_t *a, uint64_t *out, int64_t n) {
        for (int64_t i = 0; i < n; i++) store(out + 2 * i, neg1(load(a + 2 * i)));
        return 0;
    }
    DISPATCH(c_neg, (const uint64_t *a, uint64_t *out, int64_t n), (a, out, n))

    ALWAYS int64_t c_scale_body(const uint64_t *a, const uint64_t *c, uint64_t *out, int64_t n) {
        u128 factor = load(c);
        for (int64_t i = 0; i < n; i++) store(out + 2 * i, mul1(load(a + 2 * i), factor));
        return 0;
    }
    DISPATCH(c_scale, (const uint64_t *a, const uint64_t *c, uint64_t *out, int64_t n), (a, c, out, n))

    ALWAYS int64_t c_axpby_body(const uint64_t *alpha, const uint64_t *a, const uint64_t *beta,
                                const uint64_t *b, uint64_t *out, int64_t n) {
        u128 ca = load(alpha), cb = load(beta);
        for (int64_t i = 0; i < n; i++)
            store(out + 2 * i, add1(mul1(load(a + 2 * i), ca), mul1(load(b + 2 * i), cb)));
        return 0;
    }
    DISPATCH(c_axpby, (const uint64_t *alpha, const uint64_t *a, const uint64_t *beta,
                       const uint64_t *b, uint64_t *out, int64_t n), (alpha, a, beta, b, out, n))

    /* ---- reals and integers ----------------------------------------------- */

    static int64_t c_encode(const double *x, double scale, double bound, uint64_t *out, int64_t n) {
        /* the largest double below 2^126, so that the sign survives decoding */
        const double limit = ldexp(9007199254740991.0, 73);
        if (!(bound <= limit)) bound = limit;
        /* conversion to 128 bits is a slow library call */
        int narrow = bound < 4611686018427387904.0;
        for (int64_t i = 0; i < n; i++) {
            double v = rint(x[i] * scale);
            if (!(fabs(v) <= bound)) return i;      /* also catches NaN and infinities */
            if (narrow) store(out + 2 * i, from_signed((int64_t)v));
            else store(out + 2 * i, from_signed((i128)v));
        }
        return -1;
    }

    static void c_decode(const uint64_t *a, double scale, double *out, int64_t n) {
        for (int64_t i = 0; i < n; i++) {
            u128 u = load(a + 2 * i);
            i128 v = (i128)u - (u > (P127 >> 1) ? (i128)P127 : 0);
            out[i] = (double)v / scale;
        }
    }

    static void c_encode_int(const int64_t *x, uint64_t *out, int64_t n) {
        for (int64_t i = 0; i < n; i++) store(out + 2 * i, from_signed(x[i]));
    }

    /* ---- matrix products --------------------------------------------------- */

    ALWAYS int64_t c_matmul_body(const uint64_t *a, const uint64_t *b, uint64_t *out,
                                 int64_t n, int64_t k, int64_t m) {
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < m; j++) {
                lazy s = {0, 0, 0, 0};
                for (int64_t t = 0; t < k; t++) lazy_add(&s, a + 2 * (i * k + t), b + 2 * (t * m + j));
                store(out + 2 * (i * m + j), lazy_value(&s));
            }
        return 0;
    }
    DISPATCH(c_matmul, (const uint64_t *a, const uint64_t *b, uint64_t *out,
                        int64_t n, int64_t k, int64_t m), (a, b, out, n, k, m))
    """
    int64_t c_reduce_random(uint64_t *, int64_t) noexcept nogil
    int64_t c_replace_rejected(uint64_t *, int64_t, const uint64_t *, int64_t) noexcept nogil
    int64_t c_is_canonical(const uint64_t *, int64_t) noexcept nogil
    int64_t c_add(const uint64_t *, const uint64_t *, uint64_t *, int64_t) noexcept nogil
    int64_t c_sub(const uint64_t *, const uint64_t *, uint64_t *, int64_t) noexcept nogil
    int64_t c_mul(const uint64_t *, const uint64_t *, uint64_t *, int64_t) noexcept nogil
    int64_t c_neg(const uint64_t *, uint64_t *, int64_t) noexcept nogil
    int64_t c_scale(const uint64_t *, const uint64_t *, uint64_t *, int64_t) noexcept nogil
    int64_t c_axpby(const uint64_t *, const uint64_t *, const uint64_t *,
                    const uint64_t *, uint64_t *, int64_t) noexcept nogil
    int64_t c_encode(const double *, double, double, uint64_t *, int64_t) noexcept nogil
    void c_decode(const uint64_t *, double, double *, int64_t) noexcept nogil
    void c_encode_int(const int64_t *, uint64_t *, int64_t) noexcept nogil
    int64_t c_matmul(const uint64_t *, const uint64_t *, uint64_t *, int64_t, int64_t, int64_t) noexcept nogil


BITS = 127
WORDS = 2
cdef object P = (1 << 127) - 1

include "dispatch.pxi"


cdef int split(c, uint64_t *words) except -1:
    c = c % P
    words[0] = c & 0xffffffffffffffff
    words[1] = c >> 64
    return 0


def reduce_random(uint64_t[:, ::1] a):
    """Keep the low 127 bits of uniformly random elements, in place.

    Parameters
    ----------
    a : uint64 array, shape (n, 2)
        Any words.

    Returns
    -------
    int
        How many elements now equal p and must be replaced.
    """
    cdef int64_t n = a.shape[0], rejected
    same(a.shape[1], 2)
    if n == 0:
        return 0
    with nogil:
        rejected = c_reduce_random(&a[0, 0], n)
    return rejected


def replace_rejected(uint64_t[:, ::1] a, const uint64_t[:, ::1] spare):
    """Replace, in order and in place, the elements equal to p by spare random ones.

    Parameters
    ----------
    a : uint64 array, shape (n, 2)
        Elements already masked by `reduce_random`.
    spare : uint64 array, shape (m, 2)
        More random elements, unmasked.

    Returns
    -------
    int
        Number of spare elements consumed, -1 if they ran out.
    """
    cdef int64_t n = a.shape[0], m = spare.shape[0], used
    same(a.shape[1], 2)
    same(spare.shape[1], 2)
    if n == 0:
        return 0
    with nogil:
        used = c_replace_rejected(&a[0, 0], n, &spare[0, 0] if m else NULL, m)
    return used


def is_canonical(const uint64_t[:, ::1] a):
    """Tell whether every element of `a`, shape (n, 2), is below p."""
    cdef int64_t n = a.shape[0], good
    same(a.shape[1], 2)
    if n == 0:
        return True
    with nogil:
        good = c_is_canonical(&a[0, 0], n)
    return bool(good)


def add(const uint64_t[:, ::1] a, const uint64_t[:, ::1] b, uint64_t[:, ::1] out):
    """Write a + b to `out`; all of shape (n, 2), `out` may be an input."""
    cdef int64_t n = out.shape[0]
    same(a.shape[1], 2)
    same(b.shape[1], 2)
    same(out.shape[1], 2)
    same(a.shape[0], n)
    same(b.shape[0], n)
    if n:
        with nogil:
            c_add(&a[0, 0], &b[0, 0], &out[0, 0], n)


def sub(const uint64_t[:, ::1] a, const uint64_t[:, ::1] b, uint64_t[:, ::1] out):
    """Write a - b to `out`; all of shape (n, 2), `out` may be an input."""
    cdef int64_t n = out.shape[0]
    same(a.shape[1], 2)
    same(b.shape[1], 2)
    same(out.shape[1], 2)
    same(a.shape[0], n)
    same(b.shape[0], n)
    if n:
        with nogil:
            c_sub(&a[0, 0], &b[0, 0], &out[0, 0], n)


def mul(const uint64_t[:, ::1] a, const uint64_t[:, ::1] b, uint64_t[:, ::1] out):
    """Write the elementwise product to `out`; all of shape (n, 2), `out` may be an input."""
    cdef int64_t n = out.shape[0]
    same(a.shape[1], 2)
    same(b.shape[1], 2)
    same(out.shape[1], 2)
    same(a.shape[0], n)
    same(b.shape[0], n)
    if n:
        with nogil:
            c_mul(&a[0, 0], &b[0, 0], &out[0, 0], n)


def neg(const uint64_t[:, ::1] a, uint64_t[:, ::1] out):
    """Write -a to `out`; both of shape (n, 2), possibly the same array."""
    cdef int64_t n = out.shape[0]
    same(a.shape[1], 2)
    same(out.shape[1], 2)
    same(a.shape[0], n)
    if n:
        with nogil:
            c_neg(&a[0, 0], &out[0, 0], n)


def scale(const uint64_t[:, ::1] a, c, uint64_t[:, ::1] out):
    """Write c * a to `out` for the public integer `c`; arrays of shape (n, 2)."""
    cdef int64_t n = out.shape[0]
    cdef uint64_t[2] factor
    split(c, factor)
    same(a.shape[1], 2)
    same(out.shape[1], 2)
    same(a.shape[0], n)
    if n:
        with nogil:
            c_scale(&a[0, 0], factor, &out[0, 0], n)


def axpby(alpha, const uint64_t[:, ::1] a, beta, const uint64_t[:, ::1] b, uint64_t[:, ::1] out):
    """Write alpha * a + beta * b to `out`.

    Parameters
    ----------
    alpha, beta : int
        Public constants, reduced modulo p here.
    a, b, out : uint64 array, shape (n, 2)
        `out` may be an input.
    """
    cdef int64_t n = out.shape[0]
    cdef uint64_t[2] ca
    cdef uint64_t[2] cb
    split(alpha, ca)
    split(beta, cb)
    same(a.shape[1], 2)
    same(b.shape[1], 2)
    same(out.shape[1], 2)
    same(a.shape[0], n)
    same(b.shape[0], n)
    if n:
        with nogil:
            c_axpby(ca, &a[0, 0], cb, &b[0, 0], &out[0, 0], n)


def encode(const double[::1] x, double scale, double bound, uint64_t[:, ::1] out):
    """Encode reals as fixed-point field elements, rounding half to even.

    Parameters
    ----------
    x : float64 array, shape (n,)
    scale : float
        Power of two that multiplies `x`.
    bound : float
        Largest magnitude allowed after rounding; held below 2**126 in any case.
    out : uint64 array, shape (n, 2)
        Filled up to the first offender.

    Returns
    -------
    int
        -1, or the index of the first element that is not finite or too large.
    """
    cdef int64_t n = out.shape[0], where = -1
    same(out.shape[1], 2)
    same(x.shape[0], n)
    if n:
        with nogil:
            where = c_encode(&x[0], scale, bound, &out[0, 0], n)
    return where


def decode(const uint64_t[:, ::1] a, double scale, double[::1] out):
    """Write a / scale to `out` as reals, elements above p/2 being negative.

    Parameters
    ----------
    a : uint64 array, shape (n, 2)
    scale : float
    out : float64 array, shape (n,)
        Rounded to nearest when 53 bits do not suffice.
    """
    cdef int64_t n = out.shape[0]
    same(a.shape[1], 2)
    same(a.shape[0], n)
    if n:
        with nogil:
            c_decode(&a[0, 0], scale, &out[0], n)


def encode_int(const int64_t[::1] x, uint64_t[:, ::1] out):
    """Write signed integers `x`, shape (n,), to `out`, shape (n, 2), modulo p."""
    cdef int64_t n = out.shape[0]
    same(out.shape[1], 2)
    same(x.shape[0], n)
    if n:
        with nogil:
            c_encode_int(&x[0], &out[0, 0], n)


def matmul(const uint64_t[:, :, ::1] a, const uint64_t[:, :, ::1] b, uint64_t[:, :, ::1] out):
    """Write the matrix product to `out`, which may not be an input.

    Parameters
    ----------
    a : uint64 array, shape (n, k, 2)
    b : uint64 array, shape (k, m, 2)
    out : uint64 array, shape (n, m, 2)
    """
    cdef int64_t n = a.shape[0], k = a.shape[1], m = b.shape[1]
    same(a.shape[2], 2)
    same(b.shape[2], 2)
    same(out.shape[2], 2)
    same(b.shape[0], k)
    same(out.shape[0], n)
    same(out.shape[1], m)
    if n == 0 or m == 0:
        return
    if k == 0:
        out[:, :, :] = 0
        return
    with nogil:
        c_matmul(&a[0, 0, 0], &b[0, 0, 0], &out[0, 0, 0], n, k, m)
