"""Arithmetic modulo 2**64: sums of products of rows.

An element is any ``uint64``, and the processor's own arithmetic is the ring's.
Shapes are checked here, because a mismatch would overrun memory. All loops run
without the GIL.
"""

import numpy as np

from libc.stdint cimport int64_t, uint64_t

cdef extern from "ring64.h":
    int64_t c_gram(const uint64_t *, const uint64_t *, uint64_t *, int64_t, int64_t,
                   int64_t) noexcept nogil
    int64_t c_weighted_sums(const uint64_t *, const uint64_t *, uint64_t *, int64_t,
                            int64_t) noexcept nogil


BITS = 64
WORDS = 1

ctypedef uint64_t word

include "dispatch.pxi"
include "rows.pxi"


def weighted_sums(const uint64_t[::1] z, const uint64_t[:, ::1] g, uint64_t[::1] acc):
    """Add ``sum_i z_i g_id`` to `acc`.

    Parameters
    ----------
    z : uint64 array, shape (n,)
    g : uint64 array, shape (n, d)
    acc : uint64 array, shape (d,)
    """
    cdef int64_t n = z.shape[0], d = g.shape[1]
    same(g.shape[0], n)
    same(acc.shape[0], d)
    if n and d:
        with nogil:
            c_weighted_sums(&z[0], &g[0, 0], &acc[0], n, d)
