/* Rows of words of one size, some of them banded: what the rings of words have in common.
   Define WORD before: the unsigned type of an element. */
#ifndef DIPY_PPIR_ROWS_H
#define DIPY_PPIR_ROWS_H

#include <math.h>
#include <string.h>
#include "dispatch.h"

static int64_t c_check_band(const int64_t *start, int64_t n, int64_t width, int64_t ncols) {
    int64_t bad = 0;
    for (int64_t i = 0; i < n; i++) bad |= (start[i] < 0) | (start[i] > ncols - width);
    return !bad;
}

ALWAYS int64_t c_gram_banded_body(const int64_t *values, const int64_t *start,
                                  const WORD *b, WORD *acc, int64_t n, int64_t w,
                                  int64_t q) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < w; j++) {
            WORD x = (WORD)values[i * w + j];
            WORD *to = acc + (start[i] + j) * q;
            for (int64_t c = 0; c < q; c++) to[c] += x * b[i * q + c];
        }
    return 0;
}
DISPATCH(c_gram_banded, (const int64_t *values, const int64_t *start, const WORD *b,
                         WORD *acc, int64_t n, int64_t w, int64_t q),
         (values, start, b, acc, n, w, q))

ALWAYS int64_t c_band_rows_body(const int64_t *values, const int64_t *start,
                                const WORD *table, WORD *out, int64_t n, int64_t w,
                                int64_t q) {
    for (int64_t i = 0; i < n; i++) {
        WORD *to = out + i * q;
        memset(to, 0, (size_t)q * sizeof(WORD));
        for (int64_t j = 0; j < w; j++) {
            WORD x = (WORD)values[i * w + j];
            const WORD *from = table + (start[i] + j) * q;
            for (int64_t c = 0; c < q; c++) to[c] += x * from[c];
        }
    }
    return 0;
}
DISPATCH(c_band_rows, (const int64_t *values, const int64_t *start, const WORD *table,
                       WORD *out, int64_t n, int64_t w, int64_t q),
         (values, start, table, out, n, w, q))

ALWAYS int64_t c_hide_banded_body(const WORD *r, const int64_t *values,
                                  const int64_t *start, WORD *out, int64_t n, int64_t w,
                                  int64_t ncols) {
    for (int64_t i = 0; i < n; i++) {
        WORD *row = out + i * ncols;
        for (int64_t c = 0; c < ncols; c++) row[c] = (WORD)0 - r[i * ncols + c];
        for (int64_t j = 0; j < w; j++) row[start[i] + j] += (WORD)values[i * w + j];
    }
    return 0;
}
DISPATCH(c_hide_banded, (const WORD *r, const int64_t *values, const int64_t *start,
                         WORD *out, int64_t n, int64_t w, int64_t ncols),
         (r, values, start, out, n, w, ncols))

ALWAYS int64_t c_dot_rows_body(const WORD *a, const WORD *b, WORD *out, int64_t n,
                               int64_t k) {
    for (int64_t i = 0; i < n; i++) {
        WORD sum = 0;
        for (int64_t j = 0; j < k; j++) sum += a[i * k + j] * b[i * k + j];
        out[i] += sum;
    }
    return 0;
}
DISPATCH(c_dot_rows, (const WORD *a, const WORD *b, WORD *out, int64_t n, int64_t k),
         (a, b, out, n, k))

static void c_dot_banded(const int64_t *values, const int64_t *start, const WORD *b,
                         WORD *out, int64_t n, int64_t w, int64_t ncols) {
    for (int64_t i = 0; i < n; i++) {
        const WORD *row = b + i * ncols + start[i];
        for (int64_t j = 0; j < w; j++) out[i] += (WORD)values[i * w + j] * row[j];
    }
}

ALWAYS int64_t c_encode_body(const double *x, double scale, double bound, WORD *out,
                             int64_t n) {
    int64_t good = 1;
    for (int64_t i = 0; i < n; i++) {
        double v = rint(x[i] * scale);
        int64_t fits = fabs(v) <= bound;        /* false for NaN */
        good &= fits;
        out[i] = (WORD)(int64_t)(fits ? v : 0.0);
    }
    return good;
}
DISPATCH(c_encode, (const double *x, double scale, double bound, WORD *out, int64_t n),
         (x, scale, bound, out, n))

#endif
