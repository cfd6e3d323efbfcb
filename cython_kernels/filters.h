/* Weighted sums of rows of elements of 128 bits. */
#ifndef DIPY_PPIR_FILTERS_H
#define DIPY_PPIR_FILTERS_H

#include <string.h>
#include "dispatch.h"
#include "u128.h"

/* One row of a filter: weights times `taps` rows of `width` words each. Halves of
   words times weights are summed apart, as signed words, then put together. */
#define STRIP 128
#define SUM_HALVES                                                             \
    for (int64_t k = 0; k < taps; k++) {                                       \
        const uint64_t *row = x + k * stride + at;                             \
        uint64_t w = (uint64_t)(int64_t)weights[k];                            \
        for (int64_t j = 0; j < m; j++) {                                      \
            low[j] += (row[j] & 0xffffffff) * w;                               \
            high[j] += (row[j] >> 32) * w;                                     \
        }                                                                      \
    }
ALWAYS void join_halves(const uint64_t *low, const uint64_t *high, int64_t m,
                        uint64_t *out) {
    for (int64_t j = 0; j < m; j += 2) {
        u128 sum = (u128)(i128)(int64_t)low[j];
        sum += (u128)(i128)(int64_t)high[j] << 32;
        sum += (u128)low[j + 1] << 64;
        sum += (u128)high[j + 1] << 96;
        out[j] = (uint64_t)sum;
        out[j + 1] = (uint64_t)(sum >> 64);
    }
}
static void filter_row_0(const uint64_t *x, int64_t stride, const int32_t *weights,
                         int64_t taps, int64_t width, uint64_t *out) {
    uint64_t low[STRIP], high[STRIP];
    for (int64_t at = 0; at < width; at += STRIP) {
        int64_t m = width - at < STRIP ? width - at : STRIP;
        memset(low, 0, sizeof low);
        memset(high, 0, sizeof high);
        SUM_HALVES
        join_halves(low, high, m, out + at);
    }
}
#if HAVE_TARGETS
TARGET_1 static void filter_row_1(const uint64_t *x, int64_t stride,
        const int32_t *weights, int64_t taps, int64_t width, uint64_t *out) {
    int64_t at = 0;
    uint64_t low[16], high[16];
    for (; at + 16 <= width; at += 16) {
        __m256i l[4], h[4];
        for (int v = 0; v < 4; v++) l[v] = h[v] = _mm256_setzero_si256();
        for (int64_t k = 0; k < taps; k++) {
            const uint64_t *row = x + k * stride + at;
            int64_t weight = weights[k];
            __m256i w = _mm256_set1_epi64x(weight < 0 ? -weight : weight);
            for (int v = 0; v < 4; v++) {
                __m256i word = _mm256_loadu_si256((const __m256i *)(row + 4 * v));
                __m256i x0 = _mm256_mul_epu32(word, w);
                __m256i x1 = _mm256_mul_epu32(_mm256_srli_epi64(word, 32), w);
                if (weight < 0) {
                    l[v] = _mm256_sub_epi64(l[v], x0);
                    h[v] = _mm256_sub_epi64(h[v], x1);
                } else {
                    l[v] = _mm256_add_epi64(l[v], x0);
                    h[v] = _mm256_add_epi64(h[v], x1);
                }
            }
        }
        for (int v = 0; v < 4; v++) {
            _mm256_storeu_si256((__m256i *)(low + 4 * v), l[v]);
            _mm256_storeu_si256((__m256i *)(high + 4 * v), h[v]);
        }
        join_halves(low, high, 16, out + at);
    }
    if (at < width) filter_row_0(x + at, stride, weights, taps, width - at, out + at);
}
TARGET_2 static void filter_row_2(const uint64_t *x, int64_t stride,
        const int32_t *weights, int64_t taps, int64_t width, uint64_t *out) {
    int64_t at = 0;
    uint64_t low[32], high[32];
    for (; at + 32 <= width; at += 32) {
        __m512i l[4], h[4];
        for (int v = 0; v < 4; v++) l[v] = h[v] = _mm512_setzero_si512();
        for (int64_t k = 0; k < taps; k++) {
            const uint64_t *row = x + k * stride + at;
            int64_t weight = weights[k];
            __m512i w = _mm512_set1_epi64(weight < 0 ? -weight : weight);
            for (int v = 0; v < 4; v++) {
                __m512i word = _mm512_loadu_si512(row + 8 * v);
                __m512i x0 = _mm512_mul_epu32(word, w);
                __m512i x1 = _mm512_mul_epu32(_mm512_srli_epi64(word, 32), w);
                if (weight < 0) {
                    l[v] = _mm512_sub_epi64(l[v], x0);
                    h[v] = _mm512_sub_epi64(h[v], x1);
                } else {
                    l[v] = _mm512_add_epi64(l[v], x0);
                    h[v] = _mm512_add_epi64(h[v], x1);
                }
            }
        }
        for (int v = 0; v < 4; v++) {
            _mm512_storeu_si512(low + 8 * v, l[v]);
            _mm512_storeu_si512(high + 8 * v, h[v]);
        }
        join_halves(low, high, 32, out + at);
    }
    if (at < width) filter_row_1(x + at, stride, weights, taps, width - at, out + at);
}
#endif
/* The same for rows of one element. */
static u128 filter_one(const u128 *x, const int32_t *weights, int64_t taps) {
    u128 sum = 0;
    for (int64_t k = 0; k < taps; k++) sum += times(x[k], weights[k]);
    return sum;
}
/* The row of a filter with what the processor has. */
static inline void filter_row(const uint64_t *x, int64_t stride, const int32_t *weights,
                              int64_t taps, int64_t width, uint64_t *out) {
#if HAVE_TARGETS
    if (cpu_level == 2) { filter_row_2(x, stride, weights, taps, width, out); return; }
    if (cpu_level == 1) { filter_row_1(x, stride, weights, taps, width, out); return; }
#endif
    filter_row_0(x, stride, weights, taps, width, out);
}

#endif
