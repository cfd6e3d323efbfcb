/* Products of matrices modulo 2^32. */
#ifndef DIPY_PPIR_RING32_H
#define DIPY_PPIR_RING32_H

#include <stdlib.h>
#define WORD uint32_t
#include "rows.h"

/* Sixteen elements; loads and stores need no alignment and may alias. */
#define LANES 16
typedef uint32_t vec __attribute__((vector_size(64), aligned(4), may_alias));
#define AT(p) (*(vec *)(p))
#define LOAD(p) (*(const vec *)(p))
/* rows of a chunk that fits the cache */
#define CHUNK 256

static int64_t padded(int64_t q) { return (q + LANES - 1) / LANES * LANES; }

/* Add a^T b to acc for `rows` columns of a and 2 vectors of b, in registers. */
ALWAYS void tile(const uint32_t *a, int64_t p, const uint32_t *b, int64_t stride,
                 uint32_t *acc, int64_t n, const int rows, const int width) {
    vec sum[4][2];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < width; v++) sum[r][v] = LOAD(acc + r * stride + v * LANES);
    for (int64_t i = 0; i < n; i++)
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < width; v++)
                sum[r][v] += a[i * p + r] * LOAD(b + i * stride + v * LANES);
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < width; v++) AT(acc + r * stride + v * LANES) = sum[r][v];
}

/* sums and rows have padded columns */
ALWAYS int64_t c_gram_chunk_body(const uint32_t *a, const uint32_t *rows, uint32_t *sums,
                                 int64_t m, int64_t p, int64_t stride) {
    for (int64_t c = 0; c < stride; c += 2 * LANES) {
        int wide = stride - c >= 2 * LANES;
        for (int64_t r = 0; r < p;) {
            const uint32_t *left = a + r, *right = rows + c;
            uint32_t *to = sums + r * stride + c;
            if (p - r >= 4) {
                if (wide) tile(left, p, right, stride, to, m, 4, 2);
                else tile(left, p, right, stride, to, m, 4, 1);
                r += 4;
            } else {
                if (wide) tile(left, p, right, stride, to, m, 1, 2);
                else tile(left, p, right, stride, to, m, 1, 1);
                r += 1;
            }
        }
    }
    return 0;
}
DISPATCH(c_gram_chunk, (const uint32_t *a, const uint32_t *rows, uint32_t *sums, int64_t m,
                        int64_t p, int64_t stride), (a, rows, sums, m, p, stride))

static int64_t c_gram(const uint32_t *a, const uint32_t *b, uint32_t *acc,
                      int64_t n, int64_t p, int64_t q) {
    int64_t stride = padded(q);
    uint32_t *sums = calloc((size_t)((p + CHUNK) * stride), 4);
    uint32_t *rows = sums + p * stride;
    if (!sums) return 0;
    for (int64_t i = 0; i < n; i += CHUNK) {
        int64_t m = n - i < CHUNK ? n - i : CHUNK;
        for (int64_t k = 0; k < m; k++)
            memcpy(rows + k * stride, b + (i + k) * q, (size_t)q * 4);
        c_gram_chunk(a + i * p, rows, sums, m, p, stride);
    }
    for (int64_t r = 0; r < p; r++)
        for (int64_t c = 0; c < q; c++) acc[r * q + c] += sums[r * stride + c];
    free(sums);
    return 1;
}

#endif
