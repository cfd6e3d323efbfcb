/* Products of matrices modulo 2^64. */
#ifndef DIPY_PPIR_RING64_H
#define DIPY_PPIR_RING64_H

#include <stdlib.h>
#define WORD uint64_t
#include "rows.h"

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
#define WIDE(rows, width)                                                        \
    TARGET_2 static void tile_##rows##_##width(const uint64_t *a, int64_t p,     \
            const uint64_t *b, int64_t stride, uint64_t *acc, int64_t n) {       \
        tile_wide(a, p, b, stride, acc, n, rows, width);                         \
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

ALWAYS int64_t c_weighted_sums_body(const uint64_t *z, const uint64_t *g, uint64_t *acc,
                                    int64_t n, int64_t d) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t k = 0; k < d; k++) acc[k] += z[i] * g[i * d + k];
    return 0;
}
DISPATCH(c_weighted_sums, (const uint64_t *z, const uint64_t *g, uint64_t *acc, int64_t n,
                           int64_t d), (z, g, acc, n, d))

#endif
