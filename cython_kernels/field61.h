/* Loops modulo the Mersenne prime 2^61 - 1; an element is one word. */
#ifndef DIPY_PPIR_FIELD61_H
#define DIPY_PPIR_FIELD61_H

#include <math.h>
#include <stdint.h>
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

#define BINARY(name, EXPR)                                                              \
    ALWAYS int64_t name##_body(const uint64_t *a, const uint64_t *b, uint64_t *out, int64_t n) { \
        for (int64_t i = 0; i < n; i++) { uint64_t x = a[i], y = b[i]; out[i] = EXPR; } \
        return 0;                                                                       \
    }                                                                                   \
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
#define MULTIPLYING(name, PARAMS, ARGS, LANES, SCALAR)                                       \
    TARGET_2 static int64_t name##_2 PARAMS { for (int64_t i = 0; i < n; i++) out[i] = LANES; return 0; } \
    static int64_t name##_0 PARAMS { for (int64_t i = 0; i < n; i++) out[i] = SCALAR; return 0; } \
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

/* ---- matrix products --------------------------------------------------- */

/* 32 products of canonical elements stay below 2^127 */
#define LAZY 32

static void c_matmul(const uint64_t *a, const uint64_t *b, uint64_t *out,
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

#endif
