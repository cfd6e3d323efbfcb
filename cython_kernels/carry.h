/* Products of interpolated fields and derivatives of an image, modulo 2^128. */
#ifndef DIPY_PPIR_CARRY_H
#define DIPY_PPIR_CARRY_H

#include <stdlib.h>
#include <string.h>
#include "dispatch.h"
#include "filters.h"
#include "u128.h"

/* Weights of one axis: `taps` of them a row, the first at first[row]. */
typedef struct { const int64_t *first; const int32_t *weights; int64_t taps; } band;

/* Row of the interpolation along one axis, of rows of `width` elements. */
static void weigh_rows(const u128 *x, band b, int64_t row, int64_t width, u128 *out) {
    filter_row((const uint64_t *)(x + b.first[row] * width), 2 * width,
               b.weights + row * b.taps, b.taps, 2 * width, (uint64_t *)out);
}
/* The same of neighbouring elements, for a whole row. */
static void weigh_along(const u128 *x, band b, int64_t n, u128 *out) {
    for (int64_t i = 0; i < n; i++) {
        const int32_t *w = b.weights + i * b.taps;
        const u128 *from = x + b.first[i];
        u128 sum = 0;
        for (int64_t k = 0; k < b.taps; k++) sum += times(from[k], w[k]);
        out[i] = sum;
    }
}
/* sum += (row of the interpolation along the middle axis) * y, for a number of weights
   that are not zero that the compiler knows. */
ALWAYS void weigh_multiply(const u128 *const *x, const int64_t *w, const int count,
                           const u128 *y, int64_t n, u128 *sum) {
    for (int64_t i = 0; i < n; i++) {
        u128 field = times(x[0][i], w[0]);
        for (int k = 1; k < count; k++) field += times(x[k][i], w[k]);
        sum[i] += field * y[i];
    }
}
static void add_products(const u128 *wide, band b, int64_t row, const u128 *y, int64_t n,
                         u128 *sum) {
    const u128 *x[4];
    int64_t w[4];
    int count = 0;
    for (int64_t k = 0; k < b.taps; k++) {
        int64_t weight = b.weights[row * b.taps + k];
        if (!weight) continue;
        x[count] = wide + (b.first[row] + k) * n;
        w[count++] = weight;
    }
    switch (count) {
    case 1: weigh_multiply(x, w, 1, y, n, sum); break;
    case 2: weigh_multiply(x, w, 2, y, n, sum); break;
    case 3: weigh_multiply(x, w, 3, y, n, sum); break;
    case 4: weigh_multiply(x, w, 4, y, n, sum); break;
    }
}
/* A field, interpolated along the first and the last axis for one plane: `wide` has
   c[1] rows of n2 elements, times a factor; `flat` is scratch of c[1] * c[2]. */
static void weigh_plane(const u128 *field, const int64_t *c, const band *b, int64_t plane,
                        int64_t n2, int64_t factor, u128 *flat, u128 *wide) {
    int64_t coarse = c[1] * c[2];
    weigh_rows(field, b[0], plane, coarse, flat);
    if (factor != 1) for (int64_t l = 0; l < coarse; l++) flat[l] = times(flat[l], factor);
    for (int64_t j = 0; j < c[1]; j++)
        weigh_along(flat + j * c[2], b[2], n2, wide + j * n2);
}

/* out += factor * (field, interpolated) * y, for one plane of n1 by n2 voxels. */
static int64_t c_spread(const u128 *field, const int64_t *c, const band *b, int64_t plane,
                        int64_t factor, const u128 *y, int64_t n1, int64_t n2, u128 *out) {
    u128 *flat = malloc((size_t)(c[1] * (c[2] + n2)) * sizeof(u128));
    if (!flat) return 0;
    u128 *wide = flat + c[1] * c[2];
    weigh_plane(field, c, b, plane, n2, factor, flat, wide);
    for (int64_t j = 0; j < n1; j++, y += n2, out += n2)
        add_products(wide, b[1], j, y, n2, out);
    free(flat);
    return 1;
}

/* out += t * (difference of x's neighbours along an axis), for one plane; nothing at
   the borders of that axis. */
static void c_slope(const u128 *t, const u128 *x, int64_t stride, int64_t axis, int64_t n1,
                    int64_t n2, u128 *out) {
    int64_t from = axis == 1 ? n2 : 0, to = axis == 1 ? (n1 - 1) * n2 : n1 * n2;
    if (axis < 2) {
        for (int64_t i = from; i < to; i++) out[i] += t[i] * (x[i + stride] - x[i - stride]);
        return;
    }
    for (int64_t j = 0; j < n1; j++)
        for (int64_t i = j * n2 + 1; i < (j + 1) * n2 - 1; i++)
            out[i] += t[i] * (x[i + 1] - x[i - 1]);
}

/* Taps [1 -8 0 8 -1] and [-1 16 -30 16 -1] on five elements, [-3 29 -145 0 145 -29 3] on
   seven. */
static inline u128 first_of(u128 a, u128 b, u128 d, u128 e) {
    return (a - e) + ((d - b) << 3);
}
static inline u128 wide_of(u128 a, u128 b, u128 c, u128 e, u128 f, u128 g) {
    return times(g - a, 3) - times(f - b, 29) + times(e - c, 145);
}
static inline u128 second_of(u128 a, u128 b, u128 c, u128 d, u128 e) {
    u128 near = b + d;
    return (near << 4) - (a + e) - (c << 5) + (c << 1);
}
static inline int64_t clip(int64_t i, int64_t n) { return i < 0 ? 0 : i < n ? i : n - 1; }

/* Derivatives across seven rows, and along one. */
static void first_rows(const u128 *const *x, int wide, int64_t n, u128 *out) {
    if (wide)
        for (int64_t i = 0; i < n; i++)
            out[i] = wide_of(x[0][i], x[1][i], x[2][i], x[4][i], x[5][i], x[6][i]);
    else
        for (int64_t i = 0; i < n; i++)
            out[i] = first_of(x[1][i], x[2][i], x[4][i], x[5][i]);
}
static void second_rows(const u128 *const *x, int64_t n, u128 *out) {
    for (int64_t i = 0; i < n; i++)
        out[i] = second_of(x[1][i], x[2][i], x[3][i], x[4][i], x[5][i]);
}
static void first_along(const u128 *x, int wide, int64_t n, u128 *out) {
    if (wide)
        for (int64_t i = 0; i < n; i++)
            out[i] = wide_of(x[clip(i - 3, n)], x[clip(i - 2, n)], x[clip(i - 1, n)],
                             x[clip(i + 1, n)], x[clip(i + 2, n)], x[clip(i + 3, n)]);
    else
        for (int64_t i = 0; i < n; i++)
            out[i] = first_of(x[clip(i - 2, n)], x[clip(i - 1, n)], x[clip(i + 1, n)],
                              x[clip(i + 2, n)]);
}
static void rows_of(const u128 *plane, const int64_t *near, const u128 **rows) {
    for (int k = 0; k < 7; k++) rows[k] = plane + near[k];
}
static void second_along(const u128 *x, int64_t n, u128 *out) {
    for (int64_t i = 0; i < n; i++)
        out[i] = second_of(x[clip(i - 2, n)], x[clip(i - 1, n)], x[i], x[clip(i + 1, n)],
                           x[clip(i + 2, n)]);
}

/* Most fields: three first, six second derivatives. */
#define FIELDS 9
/* out += factor * sum of (field, interpolated) * (derivative of x), for one plane. Codes:
   0 1 2 along an axis, 3 a + b (a <= b) along two; first and unmixed ones are multiplied
   such that all are 144 times the derivative, 144 * 256 times with seven taps. */
static int64_t c_carry(const u128 *const *fields, const int64_t *codes, int64_t count,
                       const int64_t *c, const band *curved, const band *straight,
                       int64_t plane, int64_t factor, const u128 *x, const int64_t *n,
                       int wide_taps, u128 *out) {
    int64_t n0 = n[0], n1 = n[1], n2 = n[2], size = n1 * n2, coarse = c[1] * c[2];
    int64_t wide = c[1] * n2;
    u128 *memory = malloc((size_t)(coarse + count * (wide + n2) + size) * sizeof(u128));
    if (!memory) return 0;
    u128 *flat = memory, *rows = flat + coarse, *depth = rows + count * wide;
    u128 *slopes = depth + size;
    const u128 *at[7], *across[7];
    for (int k = 0; k < 7; k++) at[k] = x + clip(plane + k - 3, n0) * size;
    if (n0 > 1) first_rows(at, wide_taps, size, depth);
    else memset(depth, 0, (size_t)size * sizeof(u128));
    for (int64_t k = 0; k < count; k++) {
        u128 *to = rows + k * wide;
        int mixed = codes[k] == 4 || codes[k] == 5 || codes[k] == 8;
        int64_t scale = mixed ? factor : 12 * factor;
        if (wide_taps && !mixed) scale *= codes[k] < 3 ? 16 : 256;
        weigh_plane(fields[k], c, codes[k] < 3 ? curved : straight, plane, n2, scale, flat,
                    to);
    }
    for (int64_t j = 0; j < n1; j++) {
        int64_t near[7];
        for (int k = 0; k < 7; k++) near[k] = clip(j + k - 3, n1) * n2;
        const u128 *here = at[3] + j * n2;
        for (int64_t k = 0; k < count; k++) {
            u128 *to = slopes + k * n2;
            switch (codes[k]) {
            case 0: memcpy(to, depth + j * n2, (size_t)n2 * sizeof(u128)); break;
            case 1:
                rows_of(at[3], near, across);
                first_rows(across, wide_taps, n2, to);
                break;
            case 2: first_along(here, wide_taps, n2, to); break;
            case 3:
                for (int i = 0; i < 7; i++) across[i] = at[i] + j * n2;
                second_rows(across, n2, to);
                break;
            case 4:
                rows_of(depth, near, across);
                first_rows(across, wide_taps, n2, to);
                break;
            case 5: first_along(depth + j * n2, wide_taps, n2, to); break;
            case 6:
                rows_of(at[3], near, across);
                second_rows(across, n2, to);
                break;
            case 7: second_along(here, n2, to); break;
            case 8: {
                /* the row of the first derivative along axis 1 is the one of code 1 */
                for (int64_t i = 0; i < count; i++)
                    if (codes[i] == 1)
                        first_along(slopes + i * n2, wide_taps, n2, to);
                break;
            }
            }
        }
        u128 *sum = out + j * n2;
        for (int64_t k = 0; k < count; k++) {
            const u128 *slope = slopes + k * n2;
            add_products(rows + k * wide, codes[k] < 3 ? curved[1] : straight[1], j, slope,
                         n2, sum);
        }
    }
    free(memory);
    return 1;
}

#endif
