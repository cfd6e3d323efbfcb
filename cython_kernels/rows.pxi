# Python's side of rows.h; `word` is the type of an element, `BITS` its size.

cdef extern from "rows.h":
    int64_t c_check_band(const int64_t *, int64_t, int64_t, int64_t) noexcept nogil
    int64_t c_gram_banded(const int64_t *, const int64_t *, const word *, word *, int64_t,
                          int64_t, int64_t) noexcept nogil
    int64_t c_band_rows(const int64_t *, const int64_t *, const word *, word *, int64_t,
                        int64_t, int64_t) noexcept nogil
    int64_t c_hide_banded(const word *, const int64_t *, const int64_t *, word *, int64_t,
                          int64_t, int64_t) noexcept nogil
    int64_t c_dot_rows(const word *, const word *, word *, int64_t,
                       int64_t) noexcept nogil
    void c_dot_banded(const int64_t *, const int64_t *, const word *, word *, int64_t,
                      int64_t, int64_t) noexcept nogil
    int64_t c_encode(const double *, double, double, word *, int64_t) noexcept nogil


cdef const int64_t[::1] band_starts(start, int64_t n, int64_t width, int64_t ncols):
    """Widen the band starts to int64 and check that every band lies inside the matrix."""
    cdef const int64_t[::1] s = np.ascontiguousarray(
        np.asarray(start).astype(np.int64, casting="safe", copy=False))
    same(s.shape[0], n)
    if n and not c_check_band(&s[0], n, width, ncols):
        raise ValueError("a band leaves the matrix")
    return s


def encode(const double[::1] x, double scale, double bound, word[::1] out):
    """Encode reals as fixed-point elements, rounding half to even.

    Parameters
    ----------
    x : float64 array, shape (n,)
    scale : float
        Power of two that multiplies `x`.
    bound : float
        Largest magnitude allowed after rounding; held below half the ring in any case.
    out : array of words, shape (n,)

    Returns
    -------
    bool
        Whether every element was finite and within the bound.
    """
    cdef int64_t n = out.shape[0], good = 1
    cdef double limit = min(bound, 2.0 ** (BITS - 1) * (1 - 2.0**-53))
    same(x.shape[0], n)
    if n:
        with nogil:
            good = c_encode(&x[0], scale, limit, &out[0], n)
    return bool(good)


def gram(const word[:, ::1] a, const word[:, ::1] b, word[:, ::1] acc):
    """Add a^T b to `acc`.

    Parameters
    ----------
    a : array of words, shape (n, p)
    b : array of words, shape (n, q)
    acc : array of words, shape (p, q)
    """
    cdef int64_t n = a.shape[0], p = a.shape[1], q = b.shape[1], done
    same(b.shape[0], n)
    same(acc.shape[0], p)
    same(acc.shape[1], q)
    if n == 0 or p == 0 or q == 0:
        return
    with nogil:
        done = c_gram(&a[0, 0], &b[0, 0], &acc[0, 0], n, p, q)
    if not done:
        raise MemoryError


def gram_banded(const int64_t[:, ::1] values, start, const word[:, ::1] b,
                word[:, ::1] acc):
    """Add a^T b to `acc` for a banded matrix a.

    Row i of a holds ``values[i, j]`` at column ``start[i] + j``.

    Parameters
    ----------
    values : int64 array, shape (n, w)
    start : int32 or int64 array, shape (n,)
        Between 0 and ncols - w.
    b : array of words, shape (n, q)
    acc : array of words, shape (ncols, q)
    """
    cdef int64_t n = values.shape[0], w = values.shape[1], ncols = acc.shape[0]
    cdef int64_t q = b.shape[1]
    cdef const int64_t[::1] s = band_starts(start, n, w, ncols)
    same(b.shape[0], n)
    same(acc.shape[1], q)
    if n == 0 or w == 0 or q == 0:
        return
    with nogil:
        c_gram_banded(&values[0, 0], &s[0], &b[0, 0], &acc[0, 0], n, w, q)


def band_rows(const int64_t[:, ::1] values, start, const word[:, ::1] table,
              word[:, ::1] out):
    """Write the product of a banded matrix, as in `gram_banded`, with a table.

    Parameters
    ----------
    values : int64 array, shape (n, w)
    start : int32 or int64 array, shape (n,)
    table : array of words, shape (ncols, q)
    out : array of words, shape (n, q)
    """
    cdef int64_t n = values.shape[0], w = values.shape[1], ncols = table.shape[0]
    cdef int64_t q = table.shape[1]
    cdef const int64_t[::1] s = band_starts(start, n, w, ncols)
    same(out.shape[0], n)
    same(out.shape[1], q)
    if n == 0 or q == 0:
        return
    if w == 0:
        out[:, :] = 0
        return
    with nogil:
        c_band_rows(&values[0, 0], &s[0], &table[0, 0], &out[0, 0], n, w, q)


def hide_banded(const word[:, ::1] r, const int64_t[:, ::1] values, start,
                word[:, ::1] out):
    """Write a - r to `out` for the banded matrix a of `gram_banded`.

    Parameters
    ----------
    r : array of words, shape (n, ncols)
    values : int64 array, shape (n, w)
    start : int32 or int64 array, shape (n,)
    out : array of words, shape (n, ncols)
        May be `r`.
    """
    cdef int64_t n = values.shape[0], w = values.shape[1], ncols = r.shape[1]
    cdef const int64_t[::1] s = band_starts(start, n, w, ncols)
    same(r.shape[0], n)
    same(out.shape[0], n)
    same(out.shape[1], ncols)
    if n and ncols:
        with nogil:
            c_hide_banded(&r[0, 0], &values[0, 0] if w else NULL, &s[0], &out[0, 0], n, w, ncols)


def dot_rows(const word[:, ::1] a, const word[:, ::1] b, word[::1] out):
    """Add the inner product of each pair of rows to `out`.

    Parameters
    ----------
    a, b : array of words, shape (n, k)
    out : array of words, shape (n,)
    """
    cdef int64_t n = out.shape[0], k = a.shape[1]
    same(a.shape[0], n)
    same(b.shape[0], n)
    same(b.shape[1], k)
    if n and k:
        with nogil:
            c_dot_rows(&a[0, 0], &b[0, 0], &out[0], n, k)


def dot_banded(const int64_t[:, ::1] values, start, const word[:, ::1] b, word[::1] out):
    """Add each row of the banded matrix of `gram_banded` times a row of b to `out`.

    Parameters
    ----------
    values : int64 array, shape (n, w)
    start : int32 or int64 array, shape (n,)
    b : array of words, shape (n, ncols)
    out : array of words, shape (n,)
    """
    cdef int64_t n = values.shape[0], w = values.shape[1], ncols = b.shape[1]
    cdef const int64_t[::1] s = band_starts(start, n, w, ncols)
    same(b.shape[0], n)
    same(out.shape[0], n)
    if n and w:
        with nogil:
            c_dot_banded(&values[0, 0], &s[0], &b[0, 0], &out[0], n, w, ncols)
