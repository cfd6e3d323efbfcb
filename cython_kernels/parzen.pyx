"""Parzen-window kernels of the mutual information metric, for one owner's image.

Everything here is local to an owner and in clear double precision; nothing is
secret-shared yet. Formulas: Mattes et al. 2003, as in
``dipy.align.parzenhist``, whose conventions (padding of two bins, clamped bin
index, five offsets) are kept to the letter.
"""

from libc.math cimport fabs as abs, rint
from libc.stdint cimport int32_t, int64_t, uint8_t

cdef extern from "parzen.h":
    int64_t c_weigh_rows(const double *, const int32_t *, const double *, double *, int64_t, int64_t,
                         int64_t, int64_t) noexcept nogil

include "dispatch.pxi"

# Samples whose weights are made before they are multiplied.
DEF CHUNK = 256


cdef inline double _normalize(double x, double minimum, double delta) noexcept nogil:
    # dipy.align.parzenhist._bin_normalize
    if delta == 0:
        return 0
    return x / delta - minimum


cdef inline int _index(double normalized, int nbins, int padding) noexcept nogil:
    # dipy.align.parzenhist._bin_index
    cdef int i
    if normalized < padding:
        return padding
    if normalized >= nbins - padding:
        return nbins - 1 - padding
    i = <int>normalized
    return i


cdef inline double _spline(double x) noexcept nogil:
    cdef double a = -x if x < 0.0 else x
    cdef double s = x * x
    if a < 1.0:
        return (4.0 - 6.0 * s + 3.0 * s * a) / 6.0
    if a < 2.0:
        return (8.0 - 12 * a + 6.0 * s - s * a) / 6.0
    return 0.0


cdef inline double _spline_derivative(double x) noexcept nogil:
    cdef double a = -x if x < 0.0 else x
    if a < 1.0:
        return -2.0 * x + 1.5 * x * a
    if a < 2.0:
        if x >= 0:
            return -2.0 + 2.0 * x - 0.5 * x * x
        return 2.0 + 2.0 * x + 0.5 * x * x
    return 0.0


def static_bins(const double[::1] values, double minimum, double delta, int nbins,
                int padding, int32_t[::1] out):
    """Histogram bin of each static intensity, counted from the first used bin.

    Parameters
    ----------
    values : array, shape (n,)
        intensities.
    minimum, delta : double
        `smin` and `sdelta` of ``ParzenJointHistogram.setup``.
    nbins, padding : int
        number of bins and of padding bins at each end.
    out : array of int32, shape (n,)
        index in [0, nbins - 2 * padding).
    """
    cdef Py_ssize_t i
    with nogil:
        for i in range(values.shape[0]):
            out[i] = _index(_normalize(values[i], minimum, delta), nbins,
                            padding) - padding


def moving_weights(const double[::1] values, const int32_t[::1] mask, double minimum,
                   double delta, int nbins, int padding, double scale,
                   int64_t[:, ::1] weights, int32_t[::1] first, uint8_t[::1] keep):
    """Fixed-point Parzen weights of each moving intensity.

    Parameters
    ----------
    values : array, shape (n,)
        intensities.
    mask : array of int32, shape (n,), or None
        samples that are 0 here get zero weights and ``keep = 0``.
    minimum, delta : double
        `mmin` and `mdelta` of ``ParzenJointHistogram.setup``.
    nbins, padding : int
    scale : double
        a weight of 1 becomes this integer.
    weights : array of int64, shape (n, w)
        rounded weights of the bins from ``first[i]`` on: DIPY's five offsets with
        w = 5; the last four of them with w = 4, which is enough for intensities
        of at least `mmin`, since the first offset then weighs nothing.
    first : array of int32, shape (n,)
    keep : array of uint8, shape (n,)
    """
    cdef:
        Py_ssize_t i
        int c, j, width = weights.shape[1], skip = 5 - weights.shape[1]
        int64_t left
        double cn, arg
    with nogil:
        for i in range(values.shape[0]):
            cn = _normalize(values[i], minimum, delta)
            c = _index(cn, nbins, padding)
            first[i] = c - 2 + skip
            keep[i] = mask is None or mask[i] != 0
            arg = first[i] - cn
            left = <int64_t>scale
            for j in range(width):
                weights[i, j] = <int64_t>rint(_spline(arg) * scale) if keep[i] else 0
                left -= weights[i, j]
                arg += 1.0
            if keep[i] and -width <= left <= width:
                # The weights sum to one; so shall the rounded ones.
                weights[i, 2 - skip] += left


def derivative_rows(const double[::1] values, const int32_t[::1] mask, double minimum,
                    double delta, int nbins, int padding, const double[:, ::1] table,
                    double[:, ::1] out):
    """Rows of K: spline derivatives of each sample, weighed by a table.

    ``out[i, t] = sum_r spline'(r - c_i) table[r, t]`` over the five bins r
    around the normalised intensity c_i.

    Parameters
    ----------
    values, mask, minimum, delta, nbins, padding
        as for `moving_weights`.
    table : array, shape (nbins, q)
        the weight of each moving bin (rows) for each static bin (columns).
    out : array, shape (n, q)
    """
    cdef:
        Py_ssize_t i, k, m, n = values.shape[0], q = table.shape[1]
        int c, j
        double cn, arg
        double weights[CHUNK * 5]
        int32_t first[CHUNK]
        int64_t done = 1
    if n == 0 or q == 0:
        return
    with nogil:
        for i in range(0, n, CHUNK):
            m = min(CHUNK, n - i)
            for k in range(m):
                cn = _normalize(values[i + k], minimum, delta)
                c = _index(cn, nbins, padding)
                first[k] = c - 2
                arg = (c - 2) - cn
                for j in range(5):
                    weights[5 * k + j] = _spline_derivative(arg)
                    if mask is not None and mask[i + k] == 0:
                        weights[5 * k + j] = 0
                    arg += 1.0
            done &= c_weigh_rows(weights, first, &table[0, 0], &out[i, 0], m, 5, nbins, q)
    if not done:
        raise MemoryError


def derivative_weights(const double[::1] values, const int32_t[::1] mask,
                       double minimum, double delta, int nbins, int padding,
                       double scale, int64_t[:, ::1] weights, int32_t[::1] first):
    """Fixed-point spline derivatives of each moving intensity.

    The derivatives of a sample sum to zero (the weights sum to one), and the
    rounded ones are made to: then only differences of what they weigh matter.

    Parameters
    ----------
    values, mask, minimum, delta, nbins, padding, scale, weights, first
        as for `moving_weights`.
    """
    cdef:
        Py_ssize_t i
        int c, j, width = weights.shape[1], skip = 5 - weights.shape[1]
        int64_t total
        double cn, arg, d, exact
    with nogil:
        for i in range(values.shape[0]):
            cn = _normalize(values[i], minimum, delta)
            c = _index(cn, nbins, padding)
            first[i] = c - 2 + skip
            arg = first[i] - cn
            total = 0
            exact = 0
            for j in range(width):
                d = 0
                if mask is None or mask[i] != 0:
                    d = _spline_derivative(arg)
                exact += d
                weights[i, j] = <int64_t>rint(d * scale)
                total += weights[i, j]
                arg += 1.0
            if -1e-9 < exact < 1e-9:
                # Rounding leaves a remainder of at most two units.
                weights[i, 2 - skip] -= total


cdef inline void _moments(const double* gradient, const double* at, Py_ssize_t dim,
                          double* out) noexcept nogil:
    """Gradient of one sample times its position and one, row by row."""
    cdef Py_ssize_t d, e
    for d in range(dim):
        for e in range(dim):
            out[d * (dim + 1) + e] = gradient[d] * at[e]
        out[d * (dim + 1) + dim] = gradient[d]


def gradient_columns(const double[:, ::1] gradient, const double[:, ::1] points,
                     const double[:, ::1] jacobian, double[:, ::1] out):
    """Image gradient times transform Jacobian, for Jacobians linear in position.

    ``out[i, k] = sum_d,e gradient[i, d] (points[i], 1)[e] jacobian[d * (dim + 1) +
    e, k]``.

    Parameters
    ----------
    gradient : array, shape (n, dim)
        gradient of the moving image at each sample, per mm.
    points : array, shape (n, dim)
        where the Jacobian is evaluated, mm.
    jacobian : array, shape (dim * (dim + 1), p)
        the Jacobian of each of p parameters as a function of position.
    out : array, shape (n, p)
    """
    cdef:
        Py_ssize_t i, k, m, n = gradient.shape[0], dim = gradient.shape[1]
        Py_ssize_t p = jacobian.shape[1], terms = dim * (dim + 1)
        double weights[CHUNK * 12]
        int64_t done = 1
    if n == 0 or p == 0:
        return
    with nogil:
        for i in range(0, n, CHUNK):
            m = min(CHUNK, n - i)
            for k in range(m):
                _moments(&gradient[i + k, 0], &points[i + k, 0], dim, &weights[k * terms])
            done &= c_weigh_rows(weights, NULL, &jacobian[0, 0], &out[i, 0], m, terms, terms, p)
    if not done:
        raise MemoryError


cdef inline void _next(Py_ssize_t* index, const int32_t[::1] shape,
                       Py_ssize_t dim) noexcept nogil:
    cdef Py_ssize_t d = dim - 1
    index[d] += 1
    while d > 0 and index[d] == shape[d]:
        index[d] = 0
        d -= 1
        index[d] += 1


cdef inline void _unravel(Py_ssize_t flat, const int32_t[::1] shape, Py_ssize_t dim,
                          Py_ssize_t* index) noexcept nogil:
    cdef Py_ssize_t d
    for d in range(dim - 1, -1, -1):
        index[d] = flat % shape[d]
        flat //= shape[d]


def gradient_columns_grid(const double[:, ::1] gradient, Py_ssize_t start,
                          const int32_t[::1] shape, const double[:, ::1] jacobian,
                          double[:, ::1] out):
    """`gradient_columns` at consecutive voxels of a grid.

    Parameters
    ----------
    gradient : array, shape (n, dim)
        image gradient at the voxels ``start ... start + n - 1`` in C order.
    start : int
    shape : array of int32, shape (dim,)
        shape of the grid.
    jacobian : array, shape (dim * (dim + 1), p)
        the Jacobian as a function of the voxel index.
    out : array, shape (n, p)
    """
    cdef:
        Py_ssize_t i, k, m, d, n = gradient.shape[0], dim = gradient.shape[1]
        Py_ssize_t p = jacobian.shape[1], terms = dim * (dim + 1)
        Py_ssize_t index[3]
        double at[3]
        double weights[CHUNK * 12]
        int64_t done = 1
    if n == 0 or p == 0:
        return
    with nogil:
        _unravel(start, shape, dim, index)
        for i in range(0, n, CHUNK):
            m = min(CHUNK, n - i)
            for k in range(m):
                for d in range(dim):
                    at[d] = index[d]
                _moments(&gradient[i + k, 0], at, dim, &weights[k * terms])
                _next(index, shape, dim)
            done &= c_weigh_rows(weights, NULL, &jacobian[0, 0], &out[i, 0], m, terms, terms, p)
    if not done:
        raise MemoryError


def selection_bounds(const double[:, ::1] counts, const double[:, ::1] table,
                     double slack, int padding, double[:, ::1] out):
    """Bound on what a sample can select, by moving cell and position in the cell.

    A sample in moving cell c at fraction u has four spline weights. Where one of
    them is larger than the count that all samples together put into a pair of
    bins, the sample cannot be in that static bin. Over the static bins that are
    left, ``|sum_r spline'(r - c - u) table[r, t]|`` is bounded on each of a number
    of equal intervals of u.

    Parameters
    ----------
    counts : array, shape (nbins, q)
        table of the weights' sums, moving bins in rows.
    table : array, shape (nbins, q)
        what the derivatives weigh; see `derivative_rows`.
    slack : double
        how far the counts may be below the exact sums.
    padding : int
    out : array, shape (nbins - 2 * padding, intervals)
        the bounds.
    """
    cdef:
        Py_ssize_t cells = out.shape[0], parts = out.shape[1], q = table.shape[1]
        Py_ssize_t c, s, t
        int j, r, possible
        double u0, u1, h = 1.0 / out.shape[1], bound, value0, value1, bend, w, least
    with nogil:
        for c in range(cells):
            for s in range(parts):
                u0 = s * h
                u1 = u0 + h
                bound = 0
                for t in range(q):
                    possible = 1
                    value0 = value1 = bend = 0
                    for j in range(-1, 3):
                        r = <int>c + padding + j
                        # In a cell every weight is monotone in u.
                        least = min(_spline(j - u0), _spline(j - u1))
                        if least - slack > counts[r, t] * (1 + 1e-9):
                            possible = 0
                            break
                        w = table[r, t]
                        value0 += _spline_derivative(j - u0) * w
                        value1 += _spline_derivative(j - u1) * w
                        # Second derivative of the spline's derivative: constant.
                        bend += (1 if j == -1 else -3 if j == 0
                                 else 3 if j == 1 else -1) * w
                    if possible:
                        w = max(abs(value0), abs(value1)) + abs(bend) * h * h / 8
                        if w > bound:
                            bound = w
                out[c, s] = bound


def sample_bounds(const double[::1] values, const int32_t[::1] mask, double minimum,
                  double delta, int nbins, int padding, const double[:, ::1] bounds,
                  double otherwise, double least, double[::1] out):
    """Look up `selection_bounds` for each sample; returns their sum.

    Parameters
    ----------
    values, mask, minimum, delta, nbins, padding
        as for `moving_weights`.
    bounds : array, shape (nbins - 2 * padding, intervals)
    otherwise : double
        bound for intensities outside the histogram's range.
    least : double
        smallest bound to return for samples that count.
    out : array, shape (n,)
    """
    cdef:
        Py_ssize_t i, s, parts = bounds.shape[1]
        int c
        double cn, b, total = 0
    with nogil:
        for i in range(values.shape[0]):
            if mask is not None and mask[i] == 0:
                out[i] = 0
                continue
            cn = _normalize(values[i], minimum, delta)
            c = _index(cn, nbins, padding)
            b = otherwise
            if c <= cn <= c + 1:
                s = <Py_ssize_t>((cn - c) * parts)
                b = bounds[c - padding, s if s < parts else parts - 1]
            out[i] = b if b > least else least
            total += out[i]
    return total


def absolute_moments(const double[:, ::1] gradient, const double[:, ::1] points,
                     const double[::1] weight, double[:, ::1] out):
    """``out[d, e] += sum_i weight[i] |gradient[i, d]| |(points[i], 1)[e]|``.

    Parameters
    ----------
    gradient, points : array, shape (n, dim)
    weight : array, shape (n,), or None for ones
    out : array, shape (dim, dim + 1)
    """
    cdef Py_ssize_t i, d, e, dim = gradient.shape[1]
    cdef double g
    with nogil:
        for i in range(gradient.shape[0]):
            for d in range(dim):
                g = abs(gradient[i, d])
                if weight is not None:
                    g *= weight[i]
                for e in range(dim):
                    out[d, e] += g * abs(points[i, e])
                out[d, dim] += g


def absolute_moments_grid(const double[:, ::1] gradient, const int32_t[::1] shape,
                          const double[::1] weight, double[:, ::1] out):
    """`absolute_moments` over all voxels of a grid, positions as voxel indices."""
    cdef Py_ssize_t i, d, e, dim = gradient.shape[1]
    cdef Py_ssize_t index[3]
    cdef double g
    with nogil:
        _unravel(0, shape, dim, index)
        for i in range(gradient.shape[0]):
            for d in range(dim):
                g = abs(gradient[i, d])
                if weight is not None:
                    g *= weight[i]
                for e in range(dim):
                    out[d, e] += g * index[e]
                out[d, dim] += g
            _next(index, shape, dim)
