"""Arithmetic modulo the Mersenne prime 2**61 - 1.

An element is one ``uint64`` in ``[0, p)``. Every function expects canonical
inputs unless it says otherwise and leaves canonical outputs. Shapes are checked
here, because a mismatch would overrun memory; value ranges are the caller's
business. All loops run without the GIL.

The loops are C, compiled once per instruction set and chosen when the module is
imported, so that one wheel serves old and new processors.
"""

from libc.stdint cimport int64_t, uint64_t

cdef extern from *:
    """
    #include <math.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <string.h>
    #include "dispatch.h"

    #ifndef __SIZEOF_INT128__
    #error "the field kernels need a compiler with 128-bit integers (GCC or Clang)"
    #endif

    typedef unsigned __int128 u128;
    #define P61 ((((uint64_t)1) << 61) - 1)

    /* ---- scalars ---------------------------------------------------------- */

    /* [0, 2p) -> [0, p) */
    ALWAYS uint64_t once(uint64_t x) { return x >= P61 ? x - P61 : x; }

    /* any uint64 -> [0, p) */
    ALWAYS uint64_t fold64(uint64_t x) { return once((x & P61) + (x >> 61)); }

    /* any u128 -> [0, p), by words since 2^64 = 8: shifts across words are slow */
    ALWAYS uint64_t fold128(u128 x) {
        uint64_t lo = (uint64_t)x, hi = (uint64_t)(x >> 64);
        return fold64((lo & P61) + (lo >> 61) + ((hi << 3) & P61) + (hi >> 58));
    }

    /* a b -> [0, 2p), the factor 8 being there to bring bit 61 to the word boundary */
    ALWAYS uint64_t mul_lazy(uint64_t a, uint64_t b) {
        u128 x = (u128)(a << 3) * b;
        return ((uint64_t)x >> 3) + (uint64_t)(x >> 64);
    }
    ALWAYS uint64_t mul1(uint64_t a, uint64_t b) { return once(mul_lazy(a, b)); }
    ALWAYS uint64_t sub1(uint64_t a, uint64_t b) {
        uint64_t d = a - b;
        return d + (P61 & (uint64_t)((int64_t)d >> 63));
    }
    ALWAYS uint64_t neg1(uint64_t a) { return once(P61 - a); }

    /* any int64 -> [0, p): the signed top digit, from -4 to 3, has weight 1 too */
    ALWAYS uint64_t from_signed(int64_t v) {
        int64_t x = (int64_t)((uint64_t)v & P61) + (v >> 61);
        return once((uint64_t)x + (P61 & (uint64_t)(x >> 63)));
    }

    /* ---- elementwise ------------------------------------------------------ */

    ALWAYS int64_t c_reduce_random_body(uint64_t *a, int64_t n) {
        uint64_t rejected = 0;
        for (int64_t i = 0; i < n; i++) {
            a[i] &= P61;
            rejected += a[i] == P61;
        }
        return (int64_t)rejected;
    }
    DISPATCH(c_reduce_random, (uint64_t *a, int64_t n), (a, n))

    static int64_t c_replace_rejected(uint64_t *a, int64_t n, const uint64_t *spare, int64_t m) {
        int64_t used = 0;
        for (int64_t i = 0; i < n; i++) {
            if (a[i] != P61) continue;
            uint64_t v = P61;
            while (v == P61) {
                if (used == m) return -1;
                v = spare[used++] & P61;
            }
            a[i] = v;
        }
        return used;
    }

    ALWAYS int64_t c_is_canonical_body(const uint64_t *a, int64_t n) {
        uint64_t bad = 0;
        for (int64_t i = 0; i < n; i++) bad |= (uint64_t)(a[i] >= P61);
        return bad == 0;
    }
    DISPATCH(c_is_canonical, (const uint64_t *a, int64_t n), (a, n))

    #define BINARY(name, EXPR)                                                              \\
        ALWAYS int64_t name##_body(const uint64_t *a, const uint64_t *b, uint64_t *out, int64_t n) { \\
            for (int64_t i = 0; i < n; i++) { uint64_t x = a[i], y = b[i]; out[i] = EXPR; } \\
            return 0;                                                                       \\
        }                                                                                   \\
        DISPATCH(name, (const uint64_t *a, const uint64_t *b, uint64_t *out, int64_t n), (a, b, out, n))

    BINARY(c_add, once(x + y))
    BINARY(c_sub, sub1(x, y))

    ALWAYS int64_t c_neg_body(const uint64_t *a, uint64_t *out, int64_t n) {
        for (int64_t i = 0; i < n; i++) out[i] = neg1(a[i]);
        return 0;
    }
    DISPATCH(c_neg, (const uint64_t *a, uint64_t *out, int64_t n), (a, out, n))

    /* The same product from 32-bit halves, for units that multiply 64-bit lanes:
       2^64 = 8, and the middle of weight 2^32 is cut at bit 29. */
    ALWAYS uint64_t mul_lanes(uint64_t a, uint64_t b) {
        uint64_t a0 = a & 0xffffffff, a1 = a >> 32, b0 = b & 0xffffffff, b1 = b >> 32;
        uint64_t low = a0 * b0, mid = a0 * b1 + a1 * b0, top = a1 * b1;
        return (low & P61) + (low >> 61) + (top << 3) + (mid >> 29) + ((mid & 0x1fffffff) << 32);
    }

    /* Scalar multiplication unless lanes of 64 bits can be multiplied (AVX-512) */
    #define MULTIPLYING(name, PARAMS, ARGS, LANES, SCALAR)                                       \\
        TARGET_2 static int64_t name##_2 PARAMS { for (int64_t i = 0; i < n; i++) out[i] = LANES; return 0; } \\
        static int64_t name##_0 PARAMS { for (int64_t i = 0; i < n; i++) out[i] = SCALAR; return 0; } \\
        static int64_t name PARAMS { return cpu_level == 2 ? name##_2 ARGS : name##_0 ARGS; }

    MULTIPLYING(c_mul, (const uint64_t *a, const uint64_t *b, uint64_t *out, int64_t n), (a, b, out, n),
                fold64(mul_lanes(a[i], b[i])), mul1(a[i], b[i]))
    MULTIPLYING(c_scale, (const uint64_t *a, uint64_t c, uint64_t *out, int64_t n), (a, c, out, n),
                fold64(mul_lanes(a[i], c)), mul1(a[i], c))
    MULTIPLYING(c_axpby, (uint64_t alpha, const uint64_t *a, uint64_t beta, const uint64_t *b,
                          uint64_t *out, int64_t n), (alpha, a, beta, b, out, n),
                fold64(mul_lanes(alpha, a[i]) + mul_lanes(beta, b[i])),
                fold64(mul_lazy(alpha, a[i]) + mul_lazy(beta, b[i])))

    /* ---- reals and integers ----------------------------------------------- */

    static int64_t encode_wide(const double *x, double scale, double bound, uint64_t *out, int64_t n) {
        for (int64_t i = 0; i < n; i++) {
            double v = rint(x[i] * scale);
            if (!(fabs(v) <= bound)) return i;      /* also catches NaN and infinities */
            int64_t k = (int64_t)v;
            out[i] = (uint64_t)k + (P61 & (uint64_t)(k >> 63));
        }
        return -1;
    }

    /* For a bound below 2^51: adding 1.5 2^52 rounds to the nearest integer, half to
       even, and leaves it in the low bits. Whatever lies beyond 2^51 stays beyond.
       The product is exact, so that fusing it with the sum changes nothing.
       Returns 1 when all are within the bound, without a branch in the loop. */
    ALWAYS int64_t c_encode_block_body(const double *x, double scale, double bound, uint64_t *out,
                                       int64_t n) {
        const double magic = 6755399441055744.0;
        int64_t offset, good = 1;
        memcpy(&offset, &magic, 8);
        for (int64_t i = 0; i < n; i++) {
            double v = x[i] * scale + magic;
            int64_t k;
            memcpy(&k, &v, 8);
            k -= offset;
            good &= fabs(v - magic) <= bound;
            out[i] = (uint64_t)k + (P61 & (uint64_t)(k >> 63));
        }
        return good;
    }
    DISPATCH(c_encode_block, (const double *x, double scale, double bound, uint64_t *out, int64_t n),
             (x, scale, bound, out, n))

    static int64_t c_encode(const double *x, double scale, double bound, uint64_t *out, int64_t n) {
        /* the largest double below 2^60, so that the sign survives decoding */
        const double limit = 1152921504606846848.0, two51 = 2251799813685248.0;
        const int64_t block = 1024;
        if (!(bound <= limit)) bound = limit;
        if (bound >= two51) return encode_wide(x, scale, bound, out, n);
        for (int64_t i = 0; i < n; i += block) {
            int64_t m = n - i < block ? n - i : block;
            if (!c_encode_block(x + i, scale, bound, out + i, m))
                return i + encode_wide(x + i, scale, bound, out + i, m);
        }
        return -1;
    }

    ALWAYS int64_t c_decode_body(const uint64_t *a, double scale, double *out, int64_t n) {
        for (int64_t i = 0; i < n; i++) {
            int64_t v = (int64_t)a[i] - (a[i] > (P61 >> 1) ? (int64_t)P61 : 0);
            out[i] = (double)v / scale;
        }
        return 0;
    }
    DISPATCH(c_decode, (const uint64_t *a, double scale, double *out, int64_t n), (a, scale, out, n))

    ALWAYS int64_t c_encode_int_body(const int64_t *x, uint64_t *out, int64_t n) {
        for (int64_t i = 0; i < n; i++) out[i] = from_signed(x[i]);
        return 0;
    }
    DISPATCH(c_encode_int, (const int64_t *x, uint64_t *out, int64_t n), (x, out, n))

    /* ---- sums of products -------------------------------------------------- */

    /* 32 products of canonical elements stay below 2^127 */
    #define LAZY 32

    /* the slow twin of c_matmul */
    static void c_matmul_portable(const uint64_t *a, const uint64_t *b, uint64_t *out,
                                  int64_t n, int64_t k, int64_t m) {
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < m; j++) {
                u128 s = 0;
                for (int64_t t0 = 0; t0 < k; t0 += LAZY) {
                    int64_t t1 = t0 + LAZY < k ? t0 + LAZY : k;
                    for (int64_t t = t0; t < t1; t++) s += (u128)a[i * k + t] * b[t * m + j];
                    s = (s & P61) + (s >> 61);
                }
                out[i * m + j] = fold128(s);
            }
    }

    /* acc (p, q) += a^T b, the slow twin of c_gram */
    static void c_gram_portable(const uint64_t *a, const uint64_t *b, uint64_t *acc,
                                int64_t n, int64_t p, int64_t q) {
        for (int64_t i0 = 0; i0 < n; i0 += LAZY) {
            int64_t i1 = i0 + LAZY < n ? i0 + LAZY : n;
            for (int64_t j = 0; j < p; j++)
                for (int64_t k = 0; k < q; k++) {
                    u128 s = acc[j * q + k];
                    for (int64_t i = i0; i < i1; i++) s += (u128)a[i * p + j] * b[i * q + k];
                    acc[j * q + k] = fold128(s);
                }
        }
    }

    /* The same product in double precision, where vector units are widest.

       Elements are cut into three digits of base B = 2^21 and a^T b becomes a
       product of quadratics in B. That takes nine products of digits, or five
       products of values at 0, infinity, 1, -1 and 2 (Toom-3), which are five
       ordinary real matrix products. Digit values at 2 stay below 2^23 - 6, so
       sums over 64 rows are exact integers below 2^52. They are then added as
       int64, and only at the end interpolated and reduced, with B^3 = 4. */
    #define POINTS 5
    #define ROWS 64
    #define INT_ROWS 65536          /* 2^46 a row: below 2^62 */
    #define SMALL 24                /* rows below which interpolation would dominate */

    /* Digit values of `rows` rows of n elements into five planes, `plane` apart. An integer below
       2^52 becomes a double by putting it in the low bits of 2^52. */
    #define SPLIT(NAME, TARGET, BYTES)                                                       \\
        TARGET static void NAME(const uint64_t *x, int64_t rows, int64_t n, double *out,     \\
                                int64_t stride, int64_t plane) {                             \\
            typedef uint64_t uvec __attribute__((vector_size(BYTES), may_alias, aligned(8)));\\
            typedef double vec __attribute__((vector_size(BYTES), may_alias, aligned(8)));   \\
            const int64_t width = BYTES / 8;                                                 \\
            const uint64_t mask = (1 << 21) - 1, exponent = 0x4330000000000000ULL;           \\
            const double two52 = 4503599627370496.0;                                         \\
            for (int64_t i = 0; i < rows; i++, out += stride) {                              \\
                const uint64_t *row = x + i * n;                                             \\
                uint64_t tail[BYTES / 8] = {0};                                              \\
                for (int64_t j = 0; j < n; j += width) {                                     \\
                    const uint64_t *from = row + j;                                          \\
                    double *to = out + j;                                                    \\
                    if (j + width > n && n >= width) {      /* overlap the one before */     \\
                        from = row + n - width;                                              \\
                        to = out + n - width;                                                \\
                    } else if (j + width > n) {                                              \\
                        for (int64_t t = 0; t < n; t++) tail[t] = row[t];                    \\
                        from = tail;                                                         \\
                    }                                                                        \\
                    uvec v = *(const uvec *)from;                                            \\
                    vec d0 = (vec)((v & mask) | exponent) - two52;                           \\
                    vec d1 = (vec)(((v >> 21) & mask) | exponent) - two52;                   \\
                    vec d2 = (vec)((v >> 42) | exponent) - two52;                            \\
                    vec even = d0 + d2;                                                      \\
                    *(vec *)to = d0;                                                         \\
                    *(vec *)(to + plane) = d2;                                               \\
                    *(vec *)(to + 2 * plane) = even + d1;                                    \\
                    *(vec *)(to + 3 * plane) = even - d1;                                    \\
                    *(vec *)(to + 4 * plane) = d0 + 2.0 * d1 + 4.0 * d2;                     \\
                }                                                                            \\
            }                                                                                \\
        }

    /* c (J, K vectors) += a^T b over `rows` rows, all sums in registers. Adding
       `magic` puts the integer sum in the low bits of the double. */
    typedef void tile_t(const double *a, const double *b, int64_t *c, int64_t rows,
                        int64_t sa, int64_t sb, int64_t sc, double magic);

    #define TILE(NAME, TARGET, BYTES, J, K)                                                  \\
        TARGET static void NAME(const double *a, const double *b, int64_t *c, int64_t rows,  \\
                                int64_t sa, int64_t sb, int64_t sc, double magic) {          \\
            typedef double vec __attribute__((vector_size(BYTES), may_alias));               \\
            typedef int64_t ivec __attribute__((vector_size(BYTES), may_alias, aligned(8))); \\
            enum { W = BYTES / 8 };                                                          \\
            vec s[J][K];                                                                     \\
            int64_t offset;                                                                  \\
            memcpy(&offset, &magic, 8);                                                      \\
            UNROLL for (int j = 0; j < J; j++)                                               \\
                UNROLL for (int k = 0; k < K; k++) s[j][k] = (vec){0};                       \\
            for (int64_t i = 0; i < rows; i++) {                                             \\
                vec v[K];                                                                    \\
                UNROLL for (int k = 0; k < K; k++) v[k] = *(const vec *)(b + k * W);         \\
                UNROLL for (int j = 0; j < J; j++)                                           \\
                    UNROLL for (int k = 0; k < K; k++) s[j][k] += a[j] * v[k];               \\
                a += sa;                                                                     \\
                b += sb;                                                                     \\
            }                                                                                \\
            UNROLL for (int j = 0; j < J; j++)                                               \\
                UNROLL for (int k = 0; k < K; k++)                                           \\
                    *(ivec *)(c + j * sc + k * W) += (ivec)(s[j][k] + magic) - offset;       \\
        }

    /* c (4, K vectors) = a b over at most ROWS terms: the sums stay real */
    typedef void product_t(const double *a, const double *b, double *c, int64_t terms,
                           int64_t sa, int64_t sb);

    #define PRODUCT(NAME, TARGET, BYTES, K)                                                  \\
        TARGET static void NAME(const double *a, const double *b, double *c, int64_t terms,  \\
                                int64_t sa, int64_t sb) {                                    \\
            typedef double vec __attribute__((vector_size(BYTES), may_alias));               \\
            enum { W = BYTES / 8 };                                                          \\
            vec s[4][K];                                                                     \\
            UNROLL for (int j = 0; j < 4; j++)                                               \\
                UNROLL for (int k = 0; k < K; k++) s[j][k] = (vec){0};                       \\
            for (int64_t t = 0; t < terms; t++, a++, b += sb) {                              \\
                vec v[K];                                                                    \\
                UNROLL for (int k = 0; k < K; k++) v[k] = *(const vec *)(b + k * W);         \\
                UNROLL for (int j = 0; j < 4; j++)                                           \\
                    UNROLL for (int k = 0; k < K; k++) s[j][k] += a[j * sa] * v[k];          \\
            }                                                                                \\
            UNROLL for (int j = 0; j < 4; j++)                                               \\
                UNROLL for (int k = 0; k < K; k++) *(vec *)(c + j * sb + k * W) = s[j][k];   \\
        }

    /* What `interpolate` does, on real sums over at most ROWS terms: the coefficients
       are integers between 0 and 2^50 and every step is exact but the division by 3,
       whose error the next rounding to an integer removes. Writes, or adds to, out. */
    #define FINISH(NAME, TARGET, BYTES)                                                      \\
        TARGET static void NAME(const double *s, uint64_t *out, int64_t n, int64_t plane,    \\
                                int more) {                                                  \\
            typedef uint64_t uvec __attribute__((vector_size(BYTES), may_alias, aligned(8)));\\
            typedef int64_t ivec __attribute__((vector_size(BYTES), may_alias, aligned(8))); \\
            typedef double vec __attribute__((vector_size(BYTES), may_alias));               \\
            enum { W = BYTES / 8 };                                                          \\
            const uint64_t exponent = 0x4330000000000000ULL;                                 \\
            const double two52 = 4503599627370496.0, third = 1.0 / 3.0;                      \\
            for (int64_t i = 0; i < n; i += W, s += W, out += W) {                           \\
                vec s0 = *(const vec *)s, s4 = *(const vec *)(s + plane);                    \\
                vec p1 = *(const vec *)(s + 2 * plane), m1 = *(const vec *)(s + 3 * plane);  \\
                vec p2 = *(const vec *)(s + 4 * plane);                                      \\
                vec odd = (p1 - m1) * 0.5, c2 = (p1 + m1) * 0.5 - s0 - s4;                   \\
                vec c3 = (p2 - s0 - 16.0 * s4) * 0.5 - 2.0 * c2 - odd;                       \\
                c3 = (c3 * third + two52) - two52;                                           \\
                uvec e0 = (uvec)(s0 + 4.0 * c3 + two52) ^ exponent;                          \\
                uvec e1 = (uvec)(odd - c3 + 4.0 * s4 + two52) ^ exponent;                    \\
                uvec e2 = (uvec)(c2 + two52) ^ exponent;                                     \\
                uvec v = e0 + ((e1 << 21) & P61) + (e1 >> 40) + ((e2 << 42) & P61) + (e2 >> 19); \\
                v = (v & P61) + (v >> 61);                                                   \\
                v -= (uvec)((ivec)v >= (int64_t)P61) & P61;                                  \\
                if (more) {                                                                  \\
                    v += *(uvec *)out;                                                       \\
                    v -= (uvec)((ivec)v >= (int64_t)P61) & P61;                              \\
                }                                                                            \\
                *(uvec *)out = v;                                                            \\
            }                                                                                \\
        }

    #if HAVE_TARGETS
    #define UNROLL _Pragma("GCC unroll 8")
    SPLIT(split_2, TARGET_2, 64)
    SPLIT(split_1, TARGET_1, 32)
    TILE(tile_44_2, TARGET_2, 64, 4, 4)
    TILE(tile_41_2, TARGET_2, 64, 4, 1)
    TILE(tile_14_2, TARGET_2, 64, 1, 4)
    TILE(tile_11_2, TARGET_2, 64, 1, 1)
    TILE(tile_42_1, TARGET_1, 32, 4, 2)
    TILE(tile_12_1, TARGET_1, 32, 1, 2)
    PRODUCT(product_4_2, TARGET_2, 64, 4)
    PRODUCT(product_3_2, TARGET_2, 64, 3)
    PRODUCT(product_2_2, TARGET_2, 64, 2)
    PRODUCT(product_1_2, TARGET_2, 64, 1)
    PRODUCT(product_2_1, TARGET_1, 32, 2)
    FINISH(finish_2, TARGET_2, 64)
    FINISH(finish_1, TARGET_1, 32)

    static void split_rows(const uint64_t *x, int64_t rows, int64_t n, double *out, int64_t stride,
                           int64_t plane) {
        if (cpu_level == 1) split_1(x, rows, n, out, stride, plane);
        else split_2(x, rows, n, out, stride, plane);
    }

    /* any a (rows, m) and b (rows, lanes), lanes a multiple of 8 */
    static void real_gram(const double *a, const double *b, int64_t *c, int64_t rows, int64_t m,
                          int64_t lanes, int64_t sa, int64_t sb, int64_t sc, double magic) {
        for (int64_t k = 0, wide; k < lanes; k += wide) {
            tile_t *four, *one;
            if (cpu_level == 1) { wide = 8; four = tile_42_1; one = tile_12_1; }
            else if (lanes - k >= 32) { wide = 32; four = tile_44_2; one = tile_14_2; }
            else { wide = 8; four = tile_41_2; one = tile_11_2; }
            int64_t j = 0;
            for (; j + 4 <= m; j += 4) four(a + j, b + k, c + j * sc + k, rows, sa, sb, sc, magic);
            for (; j < m; j++) one(a + j, b + k, c + j * sc + k, rows, sa, sb, sc, magic);
        }
    }

    /* c (rows, sb) = a b for a row count and strides that are multiples of 4 and 8 */
    static void real_product(const double *a, const double *b, double *c, int64_t rows,
                             int64_t terms, int64_t sa, int64_t sb) {
        static product_t *const products[] = {product_1_2, product_2_2, product_3_2, product_4_2};
        for (int64_t k = 0, wide; k < sb; k += wide) {
            wide = cpu_level == 1 ? 8 : sb - k < 32 ? sb - k : 32;
            product_t *product = cpu_level == 1 ? product_2_1 : products[wide / 8 - 1];
            for (int64_t j = 0; j < rows; j += 4) product(a + j * sa, b + k, c + j * sb + k, terms, sa, sb);
        }
    }
    static void finish(const double *s, uint64_t *out, int64_t n, int64_t plane, int more) {
        if (cpu_level == 1) finish_1(s, out, n, plane, more);
        else finish_2(s, out, n, plane, more);
    }
    #else       /* never called at level 0 */
    static void real_product(const double *a, const double *b, double *c, int64_t rows,
                             int64_t terms, int64_t sa, int64_t sb) {
        (void)a; (void)b; (void)c; (void)rows; (void)terms; (void)sa; (void)sb;
    }
    static void finish(const double *s, uint64_t *out, int64_t n, int64_t plane, int more) {
        (void)s; (void)out; (void)n; (void)plane; (void)more;
    }
    static void split_rows(const uint64_t *x, int64_t rows, int64_t n, double *out, int64_t stride,
                           int64_t plane) {
        (void)x; (void)rows; (void)n; (void)out; (void)stride; (void)plane;
    }
    static void real_gram(const double *a, const double *b, int64_t *c, int64_t rows, int64_t m,
                          int64_t lanes, int64_t sa, int64_t sb, int64_t sc, double magic) {
        (void)a; (void)b; (void)c; (void)rows; (void)m; (void)lanes;
        (void)sa; (void)sb; (void)sc; (void)magic;
    }
    #endif

    typedef struct {
        int64_t m, q;           /* columns of a block of a, and of b */
        int64_t lanes;          /* columns of b taken as vectors, a multiple of 8 */
        int64_t left;           /* the others, taken the other way round */
        int64_t sa, sb;         /* strides of a and turned sums, of b and sums */
        double *a, *b;
        int64_t *c, *t;
        void *memory;
    } engine;

    static int64_t up8(int64_t n) { return (n + 7) & ~(int64_t)7; }

    static int engine_open(engine *e, int64_t m, int64_t q) {
        e->m = m; e->q = q;
        e->sa = up8(m); e->sb = up8(q);
        e->left = q % 8;
        if (e->left * (e->sa / 8) >= m) e->left = 0;
        e->lanes = e->left ? q - e->left : e->sb;
        size_t na = POINTS * ROWS * e->sa, nb = POINTS * ROWS * e->sb;
        size_t nc = POINTS * m * e->sb, nt = POINTS * e->left * e->sa;
        /* zeroed: the padding must hold numbers */
        e->memory = calloc(na + nb + nc + nt + 8, 8);
        if (!e->memory) return 0;
        e->a = (double *)(((uintptr_t)e->memory + 63) & ~(uintptr_t)63);
        e->b = e->a + na;
        e->c = (int64_t *)(e->b + nb);
        e->t = e->c + nc;
        return 1;
    }

    /* sums += a^T b for the rows held in e->a and e->b */
    static void engine_block(engine *e, int64_t rows) {
        for (int64_t k = 0; k < POINTS; k++) {
            const double two52 = 4503599627370496.0;
            double magic = k == 3 ? 1.5 * two52 : two52;        /* only at -1 are values signed */
            const double *a = e->a + k * ROWS * e->sa, *b = e->b + k * ROWS * e->sb;
            int64_t *c = e->c + k * e->m * e->sb;
            int64_t *t = e->t + k * e->left * e->sa;
            real_gram(a, b, c, rows, e->m, e->lanes, e->sa, e->sb, e->sb, magic);
            if (e->left)
                real_gram(b + e->lanes, a, t, rows, e->left, e->sa, e->sb, e->sa, e->sa, magic);
        }
    }

    ALWAYS uint64_t interpolate(int64_t s0, int64_t s4, int64_t p1, int64_t m1, int64_t p2) {
        int64_t odd = (p1 - m1) / 2;                            /* c1 + c3 */
        int64_t c2 = (p1 + m1) / 2 - s0 - s4;
        int64_t c3 = ((p2 - s0 - 4 * c2 - 16 * s4) / 2 - odd) / 3;
        int64_t c1 = odd - c3;
        return fold128((u128)(s0 + 4 * (u128)c3) + ((u128)(c1 + 4 * s4) << 21) + ((u128)c2 << 42));
    }

    static void engine_flush(engine *e, uint64_t *acc) {
        for (int64_t j = 0; j < e->m; j++)
            for (int64_t k = 0; k < e->q; k++) {
                int turned = k >= e->lanes;
                int64_t plane = turned ? e->left * e->sa : e->m * e->sb;
                const int64_t *s = turned ? e->t + (k - e->lanes) * e->sa + j : e->c + j * e->sb + k;
                uint64_t v = interpolate(s[0], s[plane], s[2 * plane], s[3 * plane], s[4 * plane]);
                acc[j * e->q + k] = once(acc[j * e->q + k] + v);
            }
        memset(e->c, 0, (size_t)(POINTS * e->m * e->sb) * 8);
        memset(e->t, 0, (size_t)(POINTS * e->left * e->sa) * 8);
    }

    /* 0 when memory ran out */
    static int64_t c_gram(const uint64_t *a, const uint64_t *b, uint64_t *acc,
                          int64_t n, int64_t p, int64_t q) {
        engine e;
        /* splitting costs about two products an element, so thin operands do without */
        if (cpu_level == 0 || n < SMALL || p * q <= 2 * (p + q)) {
            c_gram_portable(a, b, acc, n, p, q);
            return 1;
        }
        if (!engine_open(&e, p, q)) return 0;
        for (int64_t i0 = 0; i0 < n; i0 += INT_ROWS) {
            int64_t i1 = i0 + INT_ROWS < n ? i0 + INT_ROWS : n;
            for (int64_t i = i0; i < i1; i += ROWS) {
                int64_t rows = i1 - i < ROWS ? i1 - i : ROWS;
                split_rows(a + i * p, rows, p, e.a, e.sa, ROWS * e.sa);
                split_rows(b + i * q, rows, q, e.b, e.sb, ROWS * e.sb);
                engine_block(&e, rows);
            }
            engine_flush(&e, acc);
        }
        free(e.memory);
        return 1;
    }

    /* Rows of a taken at once by c_matmul, few enough for the nearest cache */
    #define MATMUL_ROWS 16

    /* 0 when memory ran out */
    static int64_t c_matmul(const uint64_t *a, const uint64_t *b, uint64_t *out,
                            int64_t n, int64_t k, int64_t m) {
        /* splitting and interpolating cost a few products an element */
        if (cpu_level == 0 || n < MATMUL_ROWS || m < 4 || k * m < 32) {
            c_matmul_portable(a, b, out, n, k, m);
            return 1;
        }
        int64_t sa = up8(k), sb = up8(m), pa = MATMUL_ROWS * sa, pb = k * sb, pc = MATMUL_ROWS * sb;
        /* zeroed: the padding must hold numbers */
        void *memory = calloc((size_t)(POINTS * (pa + pb + pc) + pc + 8), 8);
        if (!memory) return 0;
        double *da = (double *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
        double *db = da + POINTS * pa, *dc = db + POINTS * pb;
        uint64_t *result = (uint64_t *)(dc + POINTS * pc);
        split_rows(b, k, m, db, sb, pb);
        for (int64_t i = 0; i < n; i += MATMUL_ROWS) {
            int64_t rows = n - i < MATMUL_ROWS ? n - i : MATMUL_ROWS;
            split_rows(a + i * k, rows, k, da, sa, pa);
            for (int64_t t = 0; t < k; t += ROWS) {
                int64_t terms = k - t < ROWS ? k - t : ROWS;
                for (int64_t d = 0; d < POINTS; d++)
                    real_product(da + d * pa + t, db + d * pb + t * sb, dc + d * pc,
                                 (rows + 3) & ~(int64_t)3, terms, sa, sb);
                finish(dc, result, rows * sb, pc, t > 0);
            }
            for (int64_t j = 0; j < rows; j++)
                memcpy(out + (i + j) * m, result + j * sb, (size_t)m * 8);
        }
        free(memory);
        return 1;
    }

    """
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
    void c_matmul_portable(const uint64_t *, const uint64_t *, uint64_t *, int64_t, int64_t, int64_t) noexcept nogil
    int64_t c_matmul(const uint64_t *, const uint64_t *, uint64_t *, int64_t, int64_t, int64_t) noexcept nogil
    void c_gram_portable(const uint64_t *, const uint64_t *, uint64_t *, int64_t, int64_t, int64_t) noexcept nogil
    int64_t c_gram(const uint64_t *, const uint64_t *, uint64_t *, int64_t, int64_t, int64_t) noexcept nogil


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
    cdef int64_t n = a.shape[0], k = a.shape[1], m = b.shape[1], done
    same(b.shape[0], k)
    same(out.shape[0], n)
    same(out.shape[1], m)
    if n == 0 or m == 0:
        return
    if k == 0:
        out[:, :] = 0
        return
    with nogil:
        done = c_matmul(&a[0, 0], &b[0, 0], &out[0, 0], n, k, m)
    if not done:
        raise MemoryError


def _matmul_portable(const uint64_t[:, ::1] a, const uint64_t[:, ::1] b, uint64_t[:, ::1] out):
    """Do what `matmul` does with 128-bit integers: its slow twin, for tests."""
    cdef int64_t n = a.shape[0], k = a.shape[1], m = b.shape[1]
    same(b.shape[0], k)
    same(out.shape[0], n)
    same(out.shape[1], m)
    if n and k and m:
        with nogil:
            c_matmul_portable(&a[0, 0], &b[0, 0], &out[0, 0], n, k, m)


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


def _gram_portable(const uint64_t[:, ::1] a, const uint64_t[:, ::1] b, uint64_t[:, ::1] acc):
    """Do what `gram` does with 128-bit integers: its slow twin, for tests."""
    cdef int64_t n = a.shape[0], p = a.shape[1], q = b.shape[1]
    same(b.shape[0], n)
    same(acc.shape[0], p)
    same(acc.shape[1], q)
    if n and p and q:
        with nogil:
            c_gram_portable(&a[0, 0], &b[0, 0], &acc[0, 0], n, p, q)
