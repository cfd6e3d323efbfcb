"""Values and gradients of a 3D image at transformed points, in one pass.

The arithmetic follows ``dipy.align.vector_fields`` (``transform_3d_affine``,
``gradient``, ``sparse_gradient``) operation by operation, so that the results
agree to the last bit; only the passes over memory and the checks of corners that
are well inside the image are saved.
"""

from libc.math cimport floor


cdef struct Volume:
    const double* data
    Py_ssize_t ns, nr, nc


cdef inline int _interpolate(const Volume* v, double dk, double di, double dj,
                             double* out) noexcept nogil:
    # dipy.core.interpolation._interpolate_scalar_3d; returns 1 if all eight
    # corners are inside.
    cdef:
        Py_ssize_t k, i, j
        double alpha, beta, gamma, calpha, cbeta, cgamma, s
        const double* c
        int inside
    if not (-1 < dk < v.ns and -1 < di < v.nr and -1 < dj < v.nc):
        out[0] = 0
        return 0
    k = <Py_ssize_t>floor(dk)
    i = <Py_ssize_t>floor(di)
    j = <Py_ssize_t>floor(dj)
    cgamma = dk - k
    calpha = di - i
    cbeta = dj - j
    alpha = 1 - calpha
    beta = 1 - cbeta
    gamma = 1 - cgamma
    if k >= 0 and i >= 0 and j >= 0 and k + 1 < v.ns and i + 1 < v.nr and j + 1 < v.nc:
        c = v.data + (k * v.nr + i) * v.nc + j
        s = alpha * beta * gamma * c[0]
        s += alpha * cbeta * gamma * c[1]
        s += calpha * cbeta * gamma * c[v.nc + 1]
        s += calpha * beta * gamma * c[v.nc]
        c += v.nr * v.nc
        s += alpha * beta * cgamma * c[0]
        s += alpha * cbeta * cgamma * c[1]
        s += calpha * cbeta * cgamma * c[v.nc + 1]
        s += calpha * beta * cgamma * c[v.nc]
        out[0] = s
        return 1
    s = 0
    s += alpha * beta * gamma * _at(v, k, i, j)
    s += alpha * cbeta * gamma * _at(v, k, i, j + 1)
    s += calpha * cbeta * gamma * _at(v, k, i + 1, j + 1)
    s += calpha * beta * gamma * _at(v, k, i + 1, j)
    s += alpha * beta * cgamma * _at(v, k + 1, i, j)
    s += alpha * cbeta * cgamma * _at(v, k + 1, i, j + 1)
    s += calpha * cbeta * cgamma * _at(v, k + 1, i + 1, j + 1)
    s += calpha * beta * cgamma * _at(v, k + 1, i + 1, j)
    out[0] = s
    return 0


cdef inline double _at(const Volume* v, Py_ssize_t k, Py_ssize_t i,
                       Py_ssize_t j) noexcept nogil:
    if 0 <= k < v.ns and 0 <= i < v.nr and 0 <= j < v.nc:
        return v.data[(k * v.nr + i) * v.nc + j]
    return 0


cdef inline void _apply(const double* m, double x, double y, double z,
                        double* out) noexcept nogil:
    # dipy.align.vector_fields._apply_affine_3d_x0, _x1, _x2
    out[0] = m[0] * x + m[1] * y + m[2] * z + m[3]
    out[1] = m[4] * x + m[5] * y + m[6] * z + m[7]
    out[2] = m[8] * x + m[9] * y + m[10] * z + m[11]


cdef inline void _gradient(const Volume* v, const double* world2grid,
                           const double* spacing, const double* x,
                           double* out) noexcept nogil:
    # Central differences over one voxel spacing; zero where an end is outside.
    cdef:
        int p
        double low, high, h
        double d[3]
        double q[3]
    d[0] = x[0]
    d[1] = x[1]
    d[2] = x[2]
    for p in range(3):
        h = 0.5 * spacing[p]
        out[p] = 0
        d[p] = x[p] - h
        _apply(world2grid, d[0], d[1], d[2], q)
        if _interpolate(v, q[0], q[1], q[2], &low):
            d[p] = x[p] + h
            _apply(world2grid, d[0], d[1], d[2], q)
            if _interpolate(v, q[0], q[1], q[2], &high):
                out[p] = (high - low) / spacing[p]
            else:
                # DIPY goes on to the next axis from here without stepping back.
                continue
        else:
            continue
        d[p] = x[p]


def sample_grid(const double[:, :, ::1] image, const double[:, ::1] grid2grid,
                const double[:, ::1] grid2world, const double[:, ::1] world2grid,
                const double[::1] spacing, const int[::1] shape, double[::1] values,
                double[:, ::1] gradient):
    """Values and gradients of an image at the voxels of a transformed grid.

    Parameters
    ----------
    image : array, shape (S, R, C)
        the moving image.
    grid2grid : array, shape (4, 4)
        from voxels of the grid to voxels of the image.
    grid2world : array, shape (4, 4)
        from voxels of the grid to the image's world space, mm.
    world2grid : array, shape (4, 4)
        from the image's world space to its voxels.
    spacing : array, shape (3,)
        voxel size of the image, mm.
    shape : array of int32, shape (3,)
        shape of the grid.
    values : array, shape (n,)
        trilinear values, zero outside the image.
    gradient : array, shape (n, 3), or None
        gradient per mm at each voxel, zero where the image ends.
    """
    cdef:
        Volume v
        Py_ssize_t k, i, j, at = 0
        double q[3]
        double x[3]
    v.data = &image[0, 0, 0]
    v.ns, v.nr, v.nc = image.shape[0], image.shape[1], image.shape[2]
    with nogil:
        for k in range(shape[0]):
            for i in range(shape[1]):
                for j in range(shape[2]):
                    _apply(&grid2grid[0, 0], k, i, j, q)
                    _interpolate(&v, q[0], q[1], q[2], &values[at])
                    if gradient is not None:
                        _apply(&grid2world[0, 0], k, i, j, x)
                        _gradient(&v, &world2grid[0, 0], &spacing[0], x,
                                  &gradient[at, 0])
                    at += 1


def sample_points(const double[:, :, ::1] image, const double[:, ::1] affine,
                  const double[:, ::1] world2grid, const double[::1] spacing,
                  const double[:, ::1] points, double[::1] values,
                  double[:, ::1] gradient):
    """Values and gradients of an image at transformed points.

    Parameters
    ----------
    image : array, shape (S, R, C)
    affine : array, shape (4, 4)
        takes the points to the image's world space, mm.
    world2grid, spacing
        as for `sample_grid`.
    points : array, shape (n, >= 3)
    values : array, shape (n,)
    gradient : array, shape (n, 3), or None
    """
    cdef:
        Volume v
        Py_ssize_t n
        double q[3]
        double x[3]
    v.data = &image[0, 0, 0]
    v.ns, v.nr, v.nc = image.shape[0], image.shape[1], image.shape[2]
    with nogil:
        for n in range(points.shape[0]):
            _apply(&affine[0, 0], points[n, 0], points[n, 1], points[n, 2], x)
            _apply(&world2grid[0, 0], x[0], x[1], x[2], q)
            _interpolate(&v, q[0], q[1], q[2], &values[n])
            if gradient is not None:
                _gradient(&v, &world2grid[0, 0], &spacing[0], x, &gradient[n, 0])
