/* Arithmetic of polynomials modulo X^n + 1 and a prime below 2^50.

   A residue is a double that holds an integer, near zero: products are exact with a
   fused multiply-add, and everything is done in vectors. */
#ifndef DIPY_PPIR_LATTICE_H
#define DIPY_PPIR_LATTICE_H

#include "dispatch.h"

/* Butterflies of a stage are done so many at a time, or all. */
#define RUN 16
/* Bytes of a number as it is sent, and how many numbers are converted at a time. */
#define SENT 7
#define PART 64

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

/* A residue's integer in [0, q), as a double. */
ALWAYS double canonical(double x, double q, double inverse) {
    double near = near_zero(x, q, inverse);
    return near + (near < 0 ? q : 0);
}

/* Conversions of integers below 2^52, by the bits of doubles from 2^52 on: there are
   no instructions for several at a time before AVX-512. */
typedef union {
    uint64_t bits;
    double number;
} bits_of_double;

ALWAYS double from_integer(uint64_t x) {
    bits_of_double v = {.bits = x | 0x4330000000000000u};
    return v.number - 0x1p52;
}

ALWAYS uint64_t to_integer(double x) {
    bits_of_double v = {.number = x + 0x1p52};
    return v.bits & 0xfffffffffffffu;
}

/* From integers in [0, q) and back. */
ALWAYS int64_t residues_body(const uint64_t *x, double *out, int64_t n, double q) {
    double inverse = 1.0 / q;
    for (int64_t j = 0; j < n; j++)
        out[j] = near_zero(from_integer(x[j]), q, inverse);
    return 0;
}

ALWAYS int64_t integers_body(const double *x, uint64_t *out, int64_t n, double q) {
    double inverse = 1.0 / q;
    for (int64_t j = 0; j < n; j++) out[j] = to_integer(canonical(x[j], q, inverse));
    return 0;
}

/* Integers in [0, q) as they are sent: in SENT bytes each, the lowest first. */
ALWAYS int64_t packed_body(const double *x, uint8_t *out, int64_t n, double q) {
    double inverse = 1.0 / q;
    uint64_t some[PART];
    for (int64_t start = 0; start < n; start += PART) {
        int64_t count = n - start < PART ? n - start : PART;
        for (int64_t j = 0; j < count; j++)
            some[j] = to_integer(canonical(x[start + j], q, inverse));
        for (int64_t j = 0; j < count; j++, out += SENT)
            for (int b = 0; b < SENT; b++) out[b] = (uint8_t)(some[j] >> 8 * b);
    }
    return 0;
}

/* Residues of what was sent; how many integers are not below q. */
ALWAYS int64_t unpacked_body(const uint8_t *x, double *out, int64_t n, double q) {
    double inverse = 1.0 / q;
    uint64_t some[PART], limit = (uint64_t)q;
    int64_t wrong = 0;
    for (int64_t start = 0; start < n; start += PART) {
        int64_t count = n - start < PART ? n - start : PART;
        for (int64_t j = 0; j < count; j++, x += SENT) {
            some[j] = 0;
            for (int b = 0; b < SENT; b++) some[j] |= (uint64_t)x[b] << 8 * b;
        }
        for (int64_t j = 0; j < count; j++) {
            wrong += some[j] >= limit;
            out[start + j] = near_zero(from_integer(some[j]), q, inverse);
        }
    }
    return wrong;
}

/* Integers of several words, low word first, modulo q, which is above 2^32. */
ALWAYS int64_t reduced_body(const uint64_t *x, int64_t words, double *out, int64_t n,
                            double q) {
    double inverse = 1.0 / q, rest[PART];
    for (int64_t start = 0; start < n; start += PART) {
        int64_t count = n - start < PART ? n - start : PART;
        for (int64_t j = 0; j < count; j++) rest[j] = 0;
        for (int64_t w = words - 1; w >= 0; w--) {
            const uint64_t *word = x + start * words + w;
            for (int64_t j = 0; j < count; j++, word += words) {
                double high = from_integer(*word >> 32);
                double low = from_integer(*word & 0xffffffffu);
                high += product(rest[j], 0x1p32, q, inverse);
                rest[j] = product(high, 0x1p32, q, inverse) + low;
            }
        }
        for (int64_t j = 0; j < count; j++)
            out[start + j] = near_zero(rest[j], q, inverse);
    }
    return 0;
}

/* To out is added m modulo t as the nearest integer to Q m / t, modulo one of the
   primes of Q: a multiple of t away from Q m, and Q is 0 modulo q. */
ALWAYS int64_t raised_body(const uint64_t *m, double *out, int64_t n, double t,
                           double modulus_by_t, double q, double inverse_t) {
    double part = 1.0 / t, inverse = 1.0 / q;
    for (int64_t j = 0; j < n; j++) {
        double more = product(from_integer(m[j]), modulus_by_t, t, part);
        /* Halves are rounded up; others are further than 2^-51 from a half. */
        more = __builtin_fma(-__builtin_rint(more * part + 0x1p-52), t, more);
        out[j] += product(-more, inverse_t, q, inverse);
    }
    return 0;
}

/* The integer nearest to t y / q is added to some numbers, and what is left to others;
   t is below 2 q. */
ALWAYS int64_t lowered_body(const double *y, double *whole, double *fractions,
                            int64_t n, double t, double q) {
    double inverse = 1.0 / q;
    for (int64_t j = 0; j < n; j++) {
        double high = y[j] * t;
        double low = __builtin_fma(y[j], t, -high);
        double times = __builtin_rint(high * inverse);
        whole[j] += times;
        fractions[j] += (__builtin_fma(-times, q, high) + low) / q;
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
DISPATCH(residues, (const uint64_t *x, double *out, int64_t n, double q),
         (x, out, n, q))
DISPATCH(integers, (const double *x, uint64_t *out, int64_t n, double q),
         (x, out, n, q))
DISPATCH(packed, (const double *x, uint8_t *out, int64_t n, double q), (x, out, n, q))
DISPATCH(unpacked, (const uint8_t *x, double *out, int64_t n, double q), (x, out, n, q))
DISPATCH(reduced,
         (const uint64_t *x, int64_t words, double *out, int64_t n, double q),
         (x, words, out, n, q))
DISPATCH(raised,
         (const uint64_t *m, double *out, int64_t n, double t, double modulus_by_t,
          double q, double inverse_t),
         (m, out, n, t, modulus_by_t, q, inverse_t))
DISPATCH(lowered,
         (const double *y, double *whole, double *fractions, int64_t n, double t,
          double q),
         (y, whole, fractions, n, t, q))

#endif
