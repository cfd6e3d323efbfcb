/* Arithmetic of polynomials modulo X^n + 1 and a prime below 2^50.

   A residue is a double that holds an integer, near zero: products are exact with a
   fused multiply-add, and everything is done in vectors. */
#ifndef DIPY_PPIR_LATTICE_H
#define DIPY_PPIR_LATTICE_H

#include <math.h>
#include "dispatch.h"
#include "u128.h"

/* Butterflies of a stage are done so many at a time, or all. */
#define RUN 16

/* x less the multiple of q that is nearest to it. */
ALWAYS double near_zero(double x, double q, double inverse) {
    return __builtin_fma(-__builtin_rint(x * inverse), q, x);
}

/* a b modulo q, of magnitude at most 3 q / 4, if that of a b is below 2 q^2. */
ALWAYS double product(double a, double b, double q, double inverse) {
    double high = a * b;
    double low = __builtin_fma(a, b, -high);
    double times = __builtin_rint(high * inverse);
    return __builtin_fma(-times, q, high) + low;
}

ALWAYS int64_t run_of(int64_t groups, int64_t half) {
    int64_t run = groups > RUN ? groups : RUN;
    return run < half ? run : half;
}

/* One stage: of the two halves of x, into neighbours of y. */
ALWAYS void stage_forward(const double *restrict x, double *restrict y,
                          const double *restrict roots, int64_t half, int64_t run,
                          double q, double inverse) {
    for (int64_t start = 0; start < half; start += run) {
        const double *u = x + start, *v = x + half + start;
        double *out = y + 2 * start;
        for (int64_t j = 0; j < run; j++) {
            double even = near_zero(u[j], q, inverse);
            double odd = product(v[j], roots[j], q, inverse);
            out[2 * j] = even + odd;
            out[2 * j + 1] = even - odd;
        }
    }
}

ALWAYS void stage_inverse(const double *restrict x, double *restrict y,
                          const double *restrict roots, int64_t half, int64_t run,
                          double q, double inverse) {
    for (int64_t start = 0; start < half; start += run) {
        const double *in = x + 2 * start;
        double *u = y + start, *v = y + half + start;
        for (int64_t j = 0; j < run; j++) {
            double even = in[2 * j], odd = in[2 * j + 1];
            u[j] = near_zero(even + odd, q, inverse);
            v[j] = product(even - odd, roots[j], q, inverse);
        }
    }
}

/* The values of a polynomial at the odd powers of a root of -1. `work` has room for n
   numbers; roots follow one another stage by stage. */
ALWAYS int64_t transform_body(double *a, double *work, const double *roots, int64_t n,
                              double q) {
    double inverse = 1.0 / q, *from = a, *to = work;
    int64_t half = n / 2;
    for (int64_t groups = 1; groups < n; groups *= 2) {
        int64_t run = run_of(groups, half);
        stage_forward(from, to, roots, half, run, q, inverse);
        roots += run;
        double *other = from;
        from = to;
        to = other;
    }
    for (int64_t j = 0; j < n; j++) a[j] = near_zero(from[j], q, inverse);
    return 0;
}

/* The polynomial of these values: roots are the inverses, the last stage's first. */
ALWAYS int64_t untransform_body(double *a, double *work, const double *roots, int64_t n,
                                double q, double scale) {
    double inverse = 1.0 / q, *from = a, *to = work;
    int64_t half = n / 2;
    for (int64_t groups = half; groups >= 1; groups /= 2) {
        int64_t run = run_of(groups, half);
        stage_inverse(from, to, roots, half, run, q, inverse);
        roots += run;
        double *other = from;
        from = to;
        to = other;
    }
    for (int64_t j = 0; j < n; j++)
        a[j] = near_zero(product(from[j], scale, q, inverse), q, inverse);
    return 0;
}

/* acc += a b, modulo q. */
ALWAYS int64_t multiply_add_body(double *acc, const double *a, const double *b,
                                 int64_t n, double q) {
    double inverse = 1.0 / q;
    for (int64_t j = 0; j < n; j++)
        acc[j] = near_zero(acc[j] + product(a[j], b[j], q, inverse), q, inverse);
    return 0;
}

/* out = (a - b) times a constant, modulo q; of b only what it is modulo q counts. */
ALWAYS int64_t scaled_difference_body(const double *a, const double *b, double *out,
                                      int64_t n, double q, double constant) {
    double inverse = 1.0 / q;
    for (int64_t j = 0; j < n; j++) {
        double difference = near_zero(a[j] - near_zero(b[j], q, inverse), q, inverse);
        out[j] = product(difference, constant, q, inverse);
    }
    return 0;
}

DISPATCH(transform, (double *a, double *work, const double *roots, int64_t n, double q),
         (a, work, roots, n, q))
DISPATCH(untransform,
         (double *a, double *work, const double *roots, int64_t n, double q,
          double scale),
         (a, work, roots, n, q, scale))
DISPATCH(multiply_add,
         (double *acc, const double *a, const double *b, int64_t n, double q),
         (acc, a, b, n, q))
DISPATCH(scaled_difference,
         (const double *a, const double *b, double *out, int64_t n, double q,
          double constant),
         (a, b, out, n, q, constant))

/* From integers in [0, q) and back. */
static void residues(const uint64_t *x, double *out, int64_t n, uint64_t q) {
    int64_t half = (int64_t)(q / 2);
    for (int64_t j = 0; j < n; j++) {
        int64_t value = (int64_t)x[j];
        out[j] = (double)(value > half ? value - (int64_t)q : value);
    }
}

static void integers(const double *x, uint64_t *out, int64_t n, uint64_t q) {
    for (int64_t j = 0; j < n; j++) {
        int64_t value = (int64_t)x[j] % (int64_t)q;
        out[j] = (uint64_t)(value < 0 ? value + (int64_t)q : value);
    }
}

/* Integers of several words, low word first, modulo q. */
static void reduced(const uint64_t *x, int64_t words, double *out, int64_t n,
                    uint64_t q) {
    for (int64_t j = 0; j < n; j++) {
        uint64_t rest = 0;
        for (int64_t w = words - 1; w >= 0; w--)
            rest = (uint64_t)((((u128)rest << 64) | x[j * words + w]) % q);
        out[j] = (double)(rest > q / 2 ? (int64_t)(rest - q) : (int64_t)rest);
    }
}

/* m modulo t as the nearest integer to Q m / t, modulo one of the primes of Q: a
   multiple of t away from Q m, and Q is 0 modulo q. */
static void raised(const uint64_t *m, double *out, int64_t n, uint64_t t,
                   uint64_t modulus_by_t, uint64_t q, uint64_t inverse_t) {
    uint64_t half = t / 2;
    for (int64_t j = 0; j < n; j++) {
        uint64_t rest = (uint64_t)(((u128)m[j] * modulus_by_t + half) % t);
        int64_t less = (int64_t)half - (int64_t)rest;
        uint64_t positive = (uint64_t)(less < 0 ? less + (int64_t)t : less) % q;
        /* t itself, where it was added, is taken off again. */
        uint64_t value = (uint64_t)((u128)positive * inverse_t % q);
        if (less < 0) value = value ? value - 1 : q - 1;
        out[j] = (double)(value > q / 2 ? (int64_t)(value - q) : (int64_t)value);
    }
}

/* The whole part of t y / q is added to the words, modulo t, and its fraction to
   others. */
static void lowered(const uint64_t *y, uint64_t *words, double *fractions, int64_t n,
                    uint64_t t, uint64_t q) {
    for (int64_t j = 0; j < n; j++) {
        u128 whole = (u128)y[j] * t;
        words[j] = (uint64_t)(((u128)words[j] + (uint64_t)(whole / q) % t) % t);
        fractions[j] += (double)(uint64_t)(whole % q) / (double)q;
    }
}

#endif
