/* Loops modulo 2^128: products, window sums and filters. */
#ifndef DIPY_PPIR_RING128_H
#define DIPY_PPIR_RING128_H

#include <math.h>
#include <string.h>
#include "dispatch.h"
#include "filters.h"
#include "u128.h"

#define EACH(name, PARAMS, expression)                                         \
    static void name PARAMS {                                                  \
        for (int64_t i = 0; i < n; i++) out[i] = expression;                   \
    }
EACH(c_add, (const u128 *a, const u128 *b, u128 *out, int64_t n), a[i] + b[i])
EACH(c_sub, (const u128 *a, const u128 *b, u128 *out, int64_t n), a[i] - b[i])
EACH(c_neg, (const u128 *a, u128 *out, int64_t n), -a[i])
EACH(c_mul, (const u128 *a, const u128 *b, u128 *out, int64_t n), a[i] * b[i])
EACH(c_scale, (const u128 *a, u128 c, u128 *out, int64_t n), a[i] * c)
static void c_join(u128 *hidden, const u128 *other, u128 *mask, int moving, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        u128 known = hidden[i] + other[i], part = mask[i];
        hidden[i] = known + 2 * part;
        if (moving) mask[i] = known + part;
    }
}
EACH(c_addmul, (const u128 *a, const u128 *b, u128 c, u128 *out, int64_t n),
     out[i] + c * (a[i] * b[i]))
EACH(c_widen, (const int64_t *a, u128 *out, int64_t n), (u128)(i128)a[i])
EACH(c_decode, (const u128 *a, double scale, double *out, int64_t n),
     (double)(i128)a[i] / scale)

/* One owner's part of a sum without its low bits: see `protocols.truncate_part`. */
static void c_shift(const u128 *a, u128 offset, int64_t bits, int64_t minus, u128 *out,
                    int64_t n) {
    if (minus)
        for (int64_t i = 0; i < n; i++) out[i] = -((-a[i]) >> bits);
    else
        for (int64_t i = 0; i < n; i++) out[i] = ((a[i] + offset) >> bits) - (offset >> bits);
}

static u128 c_dot(const u128 *a, const u128 *b, int64_t n) {
    u128 sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static int64_t c_encode(const double *x, double scale, double limit, u128 *out,
                        int64_t n) {
    int64_t bad = -1;
    for (int64_t i = 0; i < n; i++) {
        double scaled = nearbyint(x[i] * scale);
        if (!(fabs(scaled) <= limit)) {
            if (bad < 0) bad = i;
            scaled = 0;
        }
        out[i] = (u128)(i128)scaled;
    }
    return bad;
}

/* Sums over windows of 2 r + 1 along one axis of (n, inner) elements, for the
   centres first, first + 1, ...; a window that crosses the border is cut off. */
static void c_box(const u128 *x, int64_t n, int64_t inner, int64_t radius,
                  int64_t first, int64_t count, u128 *out) {
    int64_t end = first + radius < n ? first + radius : n - 1;
    memset(out, 0, inner * sizeof(u128));
    for (int64_t k = first > radius ? first - radius : 0; k <= end; k++)
        for (int64_t j = 0; j < inner; j++) out[j] += x[k * inner + j];
    for (int64_t i = 1; i < count; i++) {
        int64_t enters = first + i + radius, leaves = first + i - radius - 1;
        const u128 *last = out, *in = x + enters * inner, *gone = x + leaves * inner;
        out += inner;
        if (enters < n && leaves >= 0)
            for (int64_t j = 0; j < inner; j++) out[j] = last[j] + in[j] - gone[j];
        else if (enters < n)
            for (int64_t j = 0; j < inner; j++) out[j] = last[j] + in[j];
        else if (leaves >= 0)
            for (int64_t j = 0; j < inner; j++) out[j] = last[j] - gone[j];
        else memcpy(out, last, inner * sizeof(u128));
    }
}

/* `count` rows of output, each from `taps` rows of x. */
static void c_filter(const uint64_t *x, const int64_t *first, const int32_t *weights,
                     int64_t taps, int64_t count, int64_t width, uint64_t *out) {
    for (int64_t i = 0; i < count; i++) {
        const uint64_t *from = x + first[i] * width;
        const int32_t *w = weights + i * taps;
        if (width == 2)
            ((u128 *)out)[i] = filter_one((const u128 *)from, w, taps);
        else
            filter_row(from, width, w, taps, width, out + i * width);
    }
}

#endif
