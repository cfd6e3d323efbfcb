"""Arithmetic modulo 2**64: sums of products of rows.

An element is any ``uint64``, and the processor's own arithmetic is the ring's.
Shapes are checked here, because a mismatch would overrun memory. All loops run
without the GIL.
"""

import numpy as np

from libc.stdint cimport int64_t, uint64_t

cdef extern from *:
    """
    #include <math.h>
    #include <stdlib.h>
    #include <string.h>
    #include "dispatch.h"

    /* Eight elements; loads and stores need no alignment and may alias. */
    #define LANES 8
    typedef uint64_t vec __attribute__((vector_size(64), aligned(8), may_alias));
    #define AT(p) (*(vec *)(p))
    #define LOAD(p) (*(const vec *)(p))
    /* rows of a chunk that fits the cache */
    #define CHUNK 256

    static int64_t padded(int64_t q) { return (q + LANES - 1) / LANES * LANES; }

    /* Each adds a^T b to acc for some columns of a and of b, summing in registers.
       Three times, because the product of words costs what the processor makes of it. */
    typedef void tile_function(const uint64_t *a, int64_t p, const uint64_t *b, int64_t stride,
                               uint64_t *acc, int64_t n);

    /* AVX-512 has it; 4 columns of a, `width` vectors of b */
    ALWAYS void tile_wide(const uint64_t *a, int64_t p, const uint64_t *b, int64_t stride,
                          uint64_t *acc, int64_t n, const int rows, const int width) {
        vec sum[4][4];
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < width; v++) sum[r][v] = LOAD(acc + r * stride + v * LANES);
        for (int64_t i = 0; i < n; i++)
            for (int r = 0; r < rows; r++)
                for (int v = 0; v < width; v++)
                    sum[r][v] += a[i * p + r] * LOAD(b + i * stride + v * LANES);
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < width; v++) AT(acc + r * stride + v * LANES) = sum[r][v];
    }
    #define WIDE(rows, width)                                                        \\
        TARGET_2 static void tile_##rows##_##width(const uint64_t *a, int64_t p,     \\
                const uint64_t *b, int64_t stride, uint64_t *acc, int64_t n) {       \\
            tile_wide(a, p, b, stride, acc, n, rows, width);                         \\
        }
    WIDE(4, 1) WIDE(4, 2) WIDE(4, 3) WIDE(4, 4) WIDE(1, 1) WIDE(1, 2) WIDE(1, 3) WIDE(1, 4)

    /* AVX2 multiplies halves of words: low halves, and the two mixed pairs, whose sum
       is shifted once at the end. */
    #if HAVE_TARGETS
    TARGET_1 static void tile_halves(const uint64_t *a, int64_t p, const uint64_t *b,
                                     int64_t stride, uint64_t *acc, int64_t n) {
        __m256i low[2], mixed[2];
        for (int v = 0; v < 2; v++) low[v] = mixed[v] = _mm256_setzero_si256();
        for (int64_t i = 0; i < n; i++) {
            __m256i x = _mm256_set1_epi64x((int64_t)a[i * p]), xh = _mm256_srli_epi64(x, 32);
            for (int v = 0; v < 2; v++) {
                __m256i y = _mm256_loadu_si256((const __m256i *)(b + i * stride + 4 * v));
                low[v] = _mm256_add_epi64(low[v], _mm256_mul_epu32(x, y));
                mixed[v] = _mm256_add_epi64(mixed[v], _mm256_add_epi64(
                    _mm256_mul_epu32(x, _mm256_srli_epi64(y, 32)), _mm256_mul_epu32(xh, y)));
            }
        }
        for (int v = 0; v < 2; v++) {
            __m256i *to = (__m256i *)(acc + 4 * v);
            __m256i sum = _mm256_add_epi64(low[v], _mm256_slli_epi64(mixed[v], 32));
            _mm256_storeu_si256(to, _mm256_add_epi64(_mm256_loadu_si256(to), sum));
        }
    }
    #endif

    /* one word at a time */
    static void tile_words(const uint64_t *a, int64_t p, const uint64_t *b, int64_t stride,
                           uint64_t *acc, int64_t n) {
        uint64_t sum[LANES];
        memcpy(sum, acc, sizeof sum);
        for (int64_t i = 0; i < n; i++)
            for (int v = 0; v < LANES; v++) sum[v] += a[i * p] * b[i * stride + v];
        memcpy(acc, sum, sizeof sum);
    }

    static int64_t c_gram(const uint64_t *a, const uint64_t *b, uint64_t *acc,
                          int64_t n, int64_t p, int64_t q) {
        static tile_function *const wide[2][4] = {
            {tile_1_1, tile_1_2, tile_1_3, tile_1_4}, {tile_4_1, tile_4_2, tile_4_3, tile_4_4}};
        int64_t stride = padded(q);
        uint64_t *memory = malloc((size_t)((p + CHUNK) * stride + LANES) * 8);
        uint64_t *sums, *rows;
        if (!memory) return 0;
        sums = (uint64_t *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
        rows = sums + p * stride;
        memset(sums, 0, (size_t)((p + CHUNK) * stride) * 8);
        for (int64_t i = 0; i < n; i += CHUNK) {
            int64_t m = n - i < CHUNK ? n - i : CHUNK;
            int64_t width, height;
            for (int64_t k = 0; k < m; k++)
                memcpy(rows + k * stride, b + (i + k) * q, (size_t)q * 8);
            for (int64_t c = 0; c < stride; c += width * LANES) {
                width = cpu_level < 2 ? 1 : (stride - c) / LANES < 4 ? (stride - c) / LANES : 4;
                for (int64_t r = 0; r < p; r += height) {
                    tile_function *tile = tile_words;
                    height = cpu_level == 2 && p - r >= 4 ? 4 : 1;
                    if (cpu_level == 2) tile = wide[height == 4][width - 1];
    #if HAVE_TARGETS
                    if (cpu_level == 1) tile = tile_halves;
    #endif
                    tile(a + i * p + r, p, rows + c, stride, sums + r * stride + c, m);
                }
            }
        }
        for (int64_t r = 0; r < p; r++)
            for (int64_t c = 0; c < q; c++) acc[r * q + c] += sums[r * stride + c];
        free(memory);
        return 1;
    }

    static int64_t c_check_band(const int64_t *start, int64_t n, int64_t width, int64_t ncols) {
        int64_t bad = 0;
        for (int64_t i = 0; i < n; i++) bad |= (start[i] < 0) | (start[i] > ncols - width);
        return !bad;
    }

    ALWAYS int64_t c_gram_banded_body(const int64_t *values, const int64_t *start,
                                      const uint64_t *b, uint64_t *acc, int64_t n, int64_t w,
                                      int64_t q) {
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < w; j++) {
                uint64_t x = (uint64_t)values[i * w + j];
                uint64_t *to = acc + (start[i] + j) * q;
                for (int64_t c = 0; c < q; c++) to[c] += x * b[i * q + c];
            }
        return 0;
    }
    DISPATCH(c_gram_banded, (const int64_t *values, const int64_t *start, const uint64_t *b,
                             uint64_t *acc, int64_t n, int64_t w, int64_t q),
             (values, start, b, acc, n, w, q))

    ALWAYS int64_t c_band_rows_body(const int64_t *values, const int64_t *start,
                                    const uint64_t *table, uint64_t *out, int64_t n, int64_t w,
                                    int64_t q) {
        for (int64_t i = 0; i < n; i++) {
            uint64_t *to = out + i * q;
            memset(to, 0, (size_t)q * 8);
            for (int64_t j = 0; j < w; j++) {
                uint64_t x = (uint64_t)values[i * w + j];
                const uint64_t *from = table + (start[i] + j) * q;
                for (int64_t c = 0; c < q; c++) to[c] += x * from[c];
            }
        }
        return 0;
    }
    DISPATCH(c_band_rows, (const int64_t *values, const int64_t *start, const uint64_t *table,
                           uint64_t *out, int64_t n, int64_t w, int64_t q),
             (values, start, table, out, n, w, q))

    ALWAYS int64_t c_hide_banded_body(const uint64_t *r, const int64_t *values,
                                      const int64_t *start, uint64_t *out, int64_t n, int64_t w,
                                      int64_t ncols) {
        for (int64_t i = 0; i < n; i++) {
            uint64_t *row = out + i * ncols;
            for (int64_t c = 0; c < ncols; c++) row[c] = (uint64_t)0 - r[i * ncols + c];
            for (int64_t j = 0; j < w; j++) row[start[i] + j] += (uint64_t)values[i * w + j];
        }
        return 0;
    }
    DISPATCH(c_hide_banded, (const uint64_t *r, const int64_t *values, const int64_t *start,
                             uint64_t *out, int64_t n, int64_t w, int64_t ncols),
             (r, values, start, out, n, w, ncols))

    ALWAYS int64_t c_dot_rows_body(const uint64_t *a, const uint64_t *b, uint64_t *out, int64_t n,
                                   int64_t k) {
        for (int64_t i = 0; i < n; i++) {
            uint64_t sum = 0;
            for (int64_t j = 0; j < k; j++) sum += a[i * k + j] * b[i * k + j];
            out[i] += sum;
        }
        return 0;
    }
    DISPATCH(c_dot_rows, (const uint64_t *a, const uint64_t *b, uint64_t *out, int64_t n, int64_t k),
             (a, b, out, n, k))

    static void c_dot_banded(const int64_t *values, const int64_t *start, const uint64_t *b,
                             uint64_t *out, int64_t n, int64_t w, int64_t ncols) {
        for (int64_t i = 0; i < n; i++) {
            const uint64_t *row = b + i * ncols + start[i];
            for (int64_t j = 0; j < w; j++) out[i] += (uint64_t)values[i * w + j] * row[j];
        }
    }

    ALWAYS int64_t c_weighted_sums_body(const uint64_t *z, const uint64_t *g, uint64_t *acc,
                                        int64_t n, int64_t d) {
        for (int64_t i = 0; i < n; i++)
            for (int64_t k = 0; k < d; k++) acc[k] += z[i] * g[i * d + k];
        return 0;
    }
    DISPATCH(c_weighted_sums, (const uint64_t *z, const uint64_t *g, uint64_t *acc, int64_t n,
                               int64_t d), (z, g, acc, n, d))

    ALWAYS int64_t c_encode_body(const double *x, double scale, double bound, uint64_t *out,
                                 int64_t n) {
        int64_t good = 1;
        for (int64_t i = 0; i < n; i++) {
            double v = rint(x[i] * scale);
            int64_t fits = fabs(v) <= bound;        /* false for NaN */
            good &= fits;
            out[i] = (uint64_t)(int64_t)(fits ? v : 0.0);
        }
        return good;
    }
    DISPATCH(c_encode, (const double *x, double scale, double bound, uint64_t *out, int64_t n),
             (x, scale, bound, out, n))
    """
    int64_t c_gram(const uint64_t *, const uint64_t *, uint64_t *, int64_t, int64_t,
                   int64_t) noexcept nogil
    int64_t c_check_band(const int64_t *, int64_t, int64_t, int64_t) noexcept nogil
    int64_t c_gram_banded(const int64_t *, const int64_t *, const uint64_t *, uint64_t *, int64_t,
                          int64_t, int64_t) noexcept nogil
    int64_t c_band_rows(const int64_t *, const int64_t *, const uint64_t *, uint64_t *, int64_t,
                        int64_t, int64_t) noexcept nogil
    int64_t c_hide_banded(const uint64_t *, const int64_t *, const int64_t *, uint64_t *, int64_t,
                          int64_t, int64_t) noexcept nogil
    int64_t c_dot_rows(const uint64_t *, const uint64_t *, uint64_t *, int64_t,
                       int64_t) noexcept nogil
    void c_dot_banded(const int64_t *, const int64_t *, const uint64_t *, uint64_t *, int64_t,
                      int64_t, int64_t) noexcept nogil
    int64_t c_weighted_sums(const uint64_t *, const uint64_t *, uint64_t *, int64_t,
                            int64_t) noexcept nogil
    int64_t c_encode(const double *, double, double, uint64_t *, int64_t) noexcept nogil


BITS = 64
WORDS = 1

include "dispatch.pxi"


cdef const int64_t[::1] band_starts(start, int64_t n, int64_t width, int64_t ncols):
    """Widen the band starts to int64 and check that every band lies inside the matrix."""
    cdef const int64_t[::1] s = np.ascontiguousarray(
        np.asarray(start).astype(np.int64, casting="safe", copy=False))
    same(s.shape[0], n)
    if n and not c_check_band(&s[0], n, width, ncols):
        raise ValueError("a band leaves the matrix")
    return s


def encode(const double[::1] x, double scale, double bound, uint64_t[::1] out):
    """Encode reals as fixed-point elements, rounding half to even.

    Parameters
    ----------
    x : float64 array, shape (n,)
    scale : float
        Power of two that multiplies `x`.
    bound : float
        Largest magnitude allowed after rounding; held below 2**63 in any case.
    out : uint64 array, shape (n,)

    Returns
    -------
    bool
        Whether every element was finite and within the bound.
    """
    cdef int64_t n = out.shape[0], good = 1
    cdef double limit = min(bound, 9223372036854774784.0)
    same(x.shape[0], n)
    if n:
        with nogil:
            good = c_encode(&x[0], scale, limit, &out[0], n)
    return bool(good)


def gram(const uint64_t[:, ::1] a, const uint64_t[:, ::1] b, uint64_t[:, ::1] acc):
    """Add a^T b to `acc`.

    Parameters
    ----------
    a : uint64 array, shape (n, p)
    b : uint64 array, shape (n, q)
    acc : uint64 array, shape (p, q)
    """
    cdef int64_t n = a.shape[0], p = a.shape[1], q = b.shape[1], done
    same(b.shape[0], n)
    same(acc.shape[0], p)
    same(acc.shape[1], q)
    if n == 0 or p == 0 or q == 0:
        return
    with nogil:
        done = c_gram(&a[0, 0], &b[0, 0], &acc[0, 0], n, p, q)
    if not done:
        raise MemoryError


def gram_banded(const int64_t[:, ::1] values, start, const uint64_t[:, ::1] b,
                uint64_t[:, ::1] acc):
    """Add a^T b to `acc` for a banded matrix a.

    Row i of a holds ``values[i, j]`` at column ``start[i] + j``.

    Parameters
    ----------
    values : int64 array, shape (n, w)
    start : int32 or int64 array, shape (n,)
        Between 0 and ncols - w.
    b : uint64 array, shape (n, q)
    acc : uint64 array, shape (ncols, q)
    """
    cdef int64_t n = values.shape[0], w = values.shape[1], ncols = acc.shape[0]
    cdef int64_t q = b.shape[1]
    cdef const int64_t[::1] s = band_starts(start, n, w, ncols)
    same(b.shape[0], n)
    same(acc.shape[1], q)
    if n == 0 or w == 0 or q == 0:
        return
    with nogil:
        c_gram_banded(&values[0, 0], &s[0], &b[0, 0], &acc[0, 0], n, w, q)


def band_rows(const int64_t[:, ::1] values, start, const uint64_t[:, ::1] table,
              uint64_t[:, ::1] out):
    """Write the product of a banded matrix, as in `gram_banded`, with a table.

    Parameters
    ----------
    values : int64 array, shape (n, w)
    start : int32 or int64 array, shape (n,)
    table : uint64 array, shape (ncols, q)
    out : uint64 array, shape (n, q)
    """
    cdef int64_t n = values.shape[0], w = values.shape[1], ncols = table.shape[0]
    cdef int64_t q = table.shape[1]
    cdef const int64_t[::1] s = band_starts(start, n, w, ncols)
    same(out.shape[0], n)
    same(out.shape[1], q)
    if n == 0 or q == 0:
        return
    if w == 0:
        out[:, :] = 0
        return
    with nogil:
        c_band_rows(&values[0, 0], &s[0], &table[0, 0], &out[0, 0], n, w, q)


def hide_banded(const uint64_t[:, ::1] r, const int64_t[:, ::1] values, start,
                uint64_t[:, ::1] out):
    """Write a - r to `out` for the banded matrix a of `gram_banded`.

    Parameters
    ----------
    r : uint64 array, shape (n, ncols)
    values : int64 array, shape (n, w)
    start : int32 or int64 array, shape (n,)
    out : uint64 array, shape (n, ncols)
        May be `r`.
    """
    cdef int64_t n = values.shape[0], w = values.shape[1], ncols = r.shape[1]
    cdef const int64_t[::1] s = band_starts(start, n, w, ncols)
    same(r.shape[0], n)
    same(out.shape[0], n)
    same(out.shape[1], ncols)
    if n and ncols:
        with nogil:
            c_hide_banded(&r[0, 0], &values[0, 0] if w else NULL, &s[0], &out[0, 0], n, w, ncols)


def dot_rows(const uint64_t[:, ::1] a, const uint64_t[:, ::1] b, uint64_t[::1] out):
    """Add the inner product of each pair of rows to `out`.

    Parameters
    ----------
    a, b : uint64 array, shape (n, k)
    out : uint64 array, shape (n,)
    """
    cdef int64_t n = out.shape[0], k = a.shape[1]
    same(a.shape[0], n)
    same(b.shape[0], n)
    same(b.shape[1], k)
    if n and k:
        with nogil:
            c_dot_rows(&a[0, 0], &b[0, 0], &out[0], n, k)


def dot_banded(const int64_t[:, ::1] values, start, const uint64_t[:, ::1] b, uint64_t[::1] out):
    """Add each row of the banded matrix of `gram_banded` times a row of b to `out`.

    Parameters
    ----------
    values : int64 array, shape (n, w)
    start : int32 or int64 array, shape (n,)
    b : uint64 array, shape (n, ncols)
    out : uint64 array, shape (n,)
    """
    cdef int64_t n = values.shape[0], w = values.shape[1], ncols = b.shape[1]
    cdef const int64_t[::1] s = band_starts(start, n, w, ncols)
    same(b.shape[0], n)
    same(out.shape[0], n)
    if n and w:
        with nogil:
            c_dot_banded(&values[0, 0], &s[0], &b[0, 0], &out[0], n, w, ncols)


def weighted_sums(const uint64_t[::1] z, const uint64_t[:, ::1] g, uint64_t[::1] acc):
    """Add ``sum_i z_i g_id`` to `acc`.

    Parameters
    ----------
    z : uint64 array, shape (n,)
    g : uint64 array, shape (n, d)
    acc : uint64 array, shape (d,)
    """
    cdef int64_t n = z.shape[0], d = g.shape[1]
    same(g.shape[0], n)
    same(acc.shape[0], d)
    if n and d:
        with nogil:
            c_weighted_sums(&z[0], &g[0, 0], &acc[0], n, d)
