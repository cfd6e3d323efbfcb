"""Products of coarse and fine arrays modulo 2**128, plane by plane.

What carries an image along on shares (`dipy_ppir.mpc.carried`): coarse fields are
interpolated where they are multiplied, so that no array of theirs is ever as large as
the image. Elements are two words, low word first, on a trailing axis of length 2; images
of two dimensions are one plane. Shapes are checked here, because a mismatch would
overrun memory. All loops run without the GIL.
"""

import numpy as np

from cython.parallel cimport prange
from libc.stdint cimport int32_t, int64_t, uint64_t

cdef extern from "carry.h":
    ctypedef struct u128:
        pass
    ctypedef struct band:
        const int64_t *first
        const int32_t *weights
        int64_t taps
    int FIELDS
    int64_t c_spread(const u128 *, const int64_t *, const band *, int64_t, int64_t,
                     const u128 *, int64_t, int64_t, u128 *) noexcept nogil
    void c_slope(const u128 *, const u128 *, int64_t, int64_t, int64_t, int64_t,
                 u128 *) noexcept nogil
    int64_t c_carry(const u128 **, const int64_t *, int64_t, const int64_t *, const band *,
                    const band *, int64_t, int64_t, const u128 *, const int64_t *, int,
                    u128 *) noexcept nogil

include "dispatch.pxi"

#: Codes of derivatives, by axes of three: what `carry` multiplies a field with.
CODES = {(0,): 0, (1,): 1, (2,): 2, (0, 0): 3, (0, 1): 4, (0, 2): 5, (1, 1): 6, (2, 2): 7,
         (1, 2): 8}


cdef class Bands:
    """Weights of an interpolation along three axes.

    Parameters
    ----------
    bands : sequence of (first, weights)
        for each axis: array of int64, shape (n,), of each row's first input, and array of
        int32, shape (n, taps).
    inputs : sequence of int
        sizes of the coarse grid.
    """

    cdef band each[3]
    cdef int64_t inputs[3]
    cdef int64_t outputs[3]
    cdef list kept

    def __init__(self, bands, inputs):
        cdef const int64_t[::1] first
        cdef const int32_t[:, ::1] weights
        self.kept = []
        for axis in range(3):
            first, weights = bands[axis]
            same(first.shape[0], weights.shape[0])
            if (weights.shape[0] == 0 or weights.shape[1] == 0 or np.min(first) < 0
                    or np.max(first) > inputs[axis] - weights.shape[1]):
                raise ValueError("the weights reach outside the array")
            self.kept += [first, weights]
            self.inputs[axis], self.outputs[axis] = inputs[axis], weights.shape[0]
            self.each[axis].first = &first[0]
            self.each[axis].weights = &weights[0, 0]
            self.each[axis].taps = weights.shape[1]
            if np.count_nonzero(weights, axis=1).max() > 4:
                raise ValueError("no more than four weights of a row may not be zero")


cdef const u128* elements(const uint64_t[:, :, :, ::1] x, const int64_t *shape) except NULL:
    for axis in range(3):
        same(x.shape[axis], shape[axis])
    same(x.shape[3], 2)
    return <const u128 *>&x[0, 0, 0, 0]


def spread(const uint64_t[:, :, :, ::1] field, Bands bands, const uint64_t[:, :, :, ::1] y,
           int64_t factor, uint64_t[:, :, :, ::1] out, int threads=1):
    """Add `factor` times an interpolated field times an array to `out`.

    Parameters
    ----------
    field : array, shape (c0, c1, c2, 2)
    bands : Bands
    y, out : array, shape (n0, n1, n2, 2)
    factor : int
        small.
    threads : int, optional
    """
    cdef const u128 *f = elements(field, bands.inputs)
    cdef const u128 *p = elements(y, bands.outputs)
    cdef u128 *q = <u128 *>elements(out, bands.outputs)
    cdef int64_t n1 = y.shape[1], n2 = y.shape[2], size = n1 * n2, done = 1
    cdef Py_ssize_t i
    for i in prange(y.shape[0], nogil=True, num_threads=threads, schedule="static"):
        if not c_spread(f, bands.inputs, bands.each, i, factor, p + i * size, n1, n2,
                        q + i * size):
            done = 0
    if not done:
        raise MemoryError


def slope_products(const uint64_t[:, :, :, ::1] t, const uint64_t[:, :, :, ::1] x,
                   Py_ssize_t axis, Py_ssize_t begin, uint64_t[:, :, :, ::1] out,
                   int threads=1):
    """Add t times the difference of x's two neighbours along an axis to `out`.

    Nothing is added at the borders of that axis.

    Parameters
    ----------
    t, x : array, shape (n0, n1, n2, 2)
    axis : int
    begin : int
        plane of t at which the first of `out` lies.
    out : array, shape (planes, n1, n2, 2)
    threads : int, optional
    """
    cdef int64_t shape[3]
    for k in range(3):
        shape[k] = x.shape[k]
    cdef const u128 *p = elements(t, shape)
    cdef const u128 *q = elements(x, shape)
    cdef int64_t n0 = x.shape[0], n1 = x.shape[1], n2 = x.shape[2], size = n1 * n2
    cdef int64_t stride = size if axis == 0 else n2 if axis == 1 else 1
    shape[0] = out.shape[0]
    cdef u128 *r = <u128 *>elements(out, shape)
    cdef Py_ssize_t i
    if not 0 <= axis < 3 or begin < 0 or begin + out.shape[0] > n0:
        raise ValueError("the planes lie outside the array")
    for i in prange(out.shape[0], nogil=True, num_threads=threads, schedule="static"):
        if axis > 0 or 0 < begin + i < n0 - 1:
            c_slope(p + (begin + i) * size, q + (begin + i) * size, stride, axis, n1, n2,
                    r + i * size)


def carry(fields, codes, Bands curved, Bands straight, const uint64_t[:, :, :, ::1] x,
          int64_t factor, bint wide, uint64_t[:, :, :, ::1] out, int threads=1):
    """Add the sum of interpolated fields times derivatives of an image to `out`.

    Derivatives are of five points, edges repeated, and times 144; with `wide` first ones
    are of seven, and all times 144 * 256.

    Parameters
    ----------
    fields : sequence of array, shape (c0, c1, c2, 2)
    codes : sequence of int
        what each is multiplied with, see `CODES`; first derivatives before others.
    curved, straight : Bands
        how fields of first and of second derivatives are interpolated.
    x, out : array, shape (n0, n1, n2, 2)
    factor : int
        of the whole sum, small.
    wide : bool
    threads : int, optional
    """
    cdef const u128 *each[9]
    cdef int64_t code[9]
    cdef int64_t count = len(fields), done = 1, size = x.shape[1] * x.shape[2]
    cdef Py_ssize_t i
    if count > FIELDS or count != len(codes) or (8 in codes and 1 not in codes):
        raise ValueError("these fields do not make a polynomial")
    for axis in range(3):
        same(curved.inputs[axis], straight.inputs[axis])
        same(curved.outputs[axis], straight.outputs[axis])
    for k in range(count):
        each[k] = elements(fields[k], curved.inputs)
        code[k] = codes[k]
        if not 0 <= code[k] < 9:
            raise ValueError("there is no such derivative")
    cdef const u128 *p = elements(x, curved.outputs)
    cdef u128 *q = <u128 *>elements(out, curved.outputs)
    for i in prange(x.shape[0], nogil=True, num_threads=threads, schedule="static"):
        if not c_carry(each, code, count, curved.inputs, curved.each, straight.each, i,
                       factor, p, curved.outputs, wide, q + i * size):
            done = 0
    if not done:
        raise MemoryError
