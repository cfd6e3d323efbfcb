"""Arithmetic modulo 2**32: sums of products of rows.

An element is any ``uint32``. Shapes are checked here, because a mismatch would overrun
memory. All loops run without the GIL.
"""

import numpy as np

from libc.stdint cimport int64_t, uint32_t

cdef extern from "ring32.h":
    int64_t c_gram(const uint32_t *, const uint32_t *, uint32_t *, int64_t, int64_t,
                   int64_t) noexcept nogil


BITS = 32
WORDS = 1

ctypedef uint32_t word

include "dispatch.pxi"
include "rows.pxi"
