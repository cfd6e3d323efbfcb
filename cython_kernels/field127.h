/* Loops modulo the Mersenne prime 2^127 - 1; an element is two words, low word first. */
#ifndef DIPY_PPIR_FIELD127_H
#define DIPY_PPIR_FIELD127_H

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

#define BINARY(name, EXPR)                                                              \
    ALWAYS int64_t name##_body(const uint64_t *a, const uint64_t *b, uint64_t *out, int64_t n) { \
        for (int64_t i = 0; i < n; i++) {                                               \
            u128 x = load(a + 2 * i), y = load(b + 2 * i);                              \
            store(out + 2 * i, EXPR);                                                   \
        }                                                                               \
        return 0;                                                                       \
    }                                                                                   \
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

#endif
