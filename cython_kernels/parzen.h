/* Weighted sums of rows of a table. */
#ifndef DIPY_PPIR_PARZEN_H
#define DIPY_PPIR_PARZEN_H

#include <stdlib.h>
#include <string.h>
#include "dispatch.h"

#define LANES 8
typedef double vec __attribute__((vector_size(64), aligned(8), may_alias));

/* out[i] = sum_j a[i, j] table[first[i] + j], or table[j] where first is NULL */
ALWAYS int64_t c_weigh_rows_body(const double *a, const int32_t *first, const double *table,
                                 double *out, int64_t n, int64_t w, int64_t rows, int64_t q) {
    int64_t stride = (q + LANES - 1) / LANES * LANES;
    double *padded = calloc((size_t)((rows + 1) * stride), sizeof(double));
    double *line = padded + rows * stride;
    if (!padded) return 0;
    for (int64_t r = 0; r < rows; r++)
        memcpy(padded + r * stride, table + r * q, (size_t)q * sizeof(double));
    for (int64_t i = 0; i < n; i++) {
        const double *from = padded + (first ? first[i] * stride : 0);
        for (int64_t c = 0; c < stride; c += LANES) {
            vec sum = {0};
            for (int64_t j = 0; j < w; j++)
                sum += a[i * w + j] * *(const vec *)(from + j * stride + c);
            *(vec *)(line + c) = sum;
        }
        memcpy(out + i * q, line, (size_t)q * sizeof(double));
    }
    free(padded);
    return 1;
}
DISPATCH(c_weigh_rows, (const double *a, const int32_t *first, const double *table, double *out,
                        int64_t n, int64_t w, int64_t rows, int64_t q),
         (a, first, table, out, n, w, rows, q))

#endif
