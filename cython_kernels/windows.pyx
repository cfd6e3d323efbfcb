"""Statistics of an image over the windows of the local cross-correlation.

Images are integers here, so window sums are exact, and running sums give the same
numbers as sums from scratch, whatever the order and the number of threads. All
loops run without the GIL.
"""

from cython.parallel cimport prange
from libc.math cimport sqrt
from libc.stdint cimport int64_t, uint64_t

include "dispatch.pxi"


# Without sign: with what enters a window and before what leaves it, a sum may be too
# large for int64, and C promises nothing of signed integers that wrap around.
cdef void window_sums(const uint64_t *x, Py_ssize_t n, Py_ssize_t inner,
                      Py_ssize_t radius, Py_ssize_t first, Py_ssize_t count,
                      uint64_t *out) noexcept nogil:
    cdef Py_ssize_t i, j, k, enters, leaves
    for j in range(inner):
        out[j] = 0
    for k in range(max(first - radius, 0), min(first + radius + 1, n)):
        for j in range(inner):
            out[j] += x[k * inner + j]
    for i in range(1, count):
        enters = first + i + radius
        leaves = first + i - radius - 1
        for j in range(inner):
            out[i * inner + j] = out[(i - 1) * inner + j]
        if enters < n:
            for j in range(inner):
                out[i * inner + j] += x[enters * inner + j]
        if leaves >= 0:
            for j in range(inner):
                out[i * inner + j] -= x[leaves * inner + j]


def box(const int64_t[:, :, ::1] x, Py_ssize_t radius, Py_ssize_t first,
        int64_t[:, :, ::1] out, int threads=1):
    """Sums over windows of ``2 * radius + 1`` elements along one axis.

    Parameters
    ----------
    x : array, shape (outer, n, inner)
    radius : int
    first : int
        centre of the first window; windows are cut off at the borders.
    out : array, shape (outer, count, inner)
    threads : int, optional
        the outer index is divided among so many threads.
    """
    cdef Py_ssize_t outer = x.shape[0], n = x.shape[1], inner = x.shape[2]
    cdef Py_ssize_t count = out.shape[1], i
    same(outer, out.shape[0])
    same(inner, out.shape[2])
    if radius < 0 or first < 0 or first > n - count:
        raise ValueError("windows lie outside the array")
    radius = min(radius, n)
    if outer == 0 or count == 0 or inner == 0:
        return
    for i in prange(outer, nogil=True, num_threads=threads, schedule="static"):
        window_sums(<const uint64_t *>&x[i, 0, 0], n, inner, radius, first, count,
                    <uint64_t *>&out[i, 0, 0])


def normalize(const int64_t[::1] values, const int64_t[::1] sums,
              const int64_t[::1] squares, const int64_t[::1] counts, double least,
              double[::1] inverse, double[::1] residual, int threads=1):
    r"""Inverse norm and normalised residual of every window.

    With the N values x of a window, .. math:: V = N \sum x^2 - (\sum x)^2 is N times
    the sum E of squared deviations from the mean.

    Parameters
    ----------
    values : array of int64, shape (n,)
        the image at the windows' centres.
    sums, squares, counts : array of int64, shape (n,)
        sum of the values, of their squares, and number of voxels of each window.
    least : float
        windows whose standard deviation is below this are flat.
    inverse : array, shape (n,)
        becomes 1 / sqrt(E); 0 where the window is flat.
    residual : array, shape (n,)
        becomes (x - mean) / sqrt(E), in [-1, 1]; 0 where the window is flat.
    threads : int, optional
    """
    cdef Py_ssize_t n = values.shape[0], i
    cdef int64_t count, variance
    cdef double scale
    same(n, sums.shape[0])
    same(n, squares.shape[0])
    same(n, counts.shape[0])
    same(n, inverse.shape[0])
    same(n, residual.shape[0])
    for i in prange(n, nogil=True, num_threads=threads, schedule="static"):
        count = counts[i]
        variance = count * squares[i] - sums[i] * sums[i]
        if variance <= 0 or sqrt(<double>variance) < least * <double>count:
            inverse[i] = 0
            residual[i] = 0
        else:
            scale = 1.0 / sqrt(<double>variance)
            inverse[i] = sqrt(<double>count) * scale
            residual[i] = (
                <double>(count * values[i] - sums[i]) * scale / sqrt(<double>count)
            )
