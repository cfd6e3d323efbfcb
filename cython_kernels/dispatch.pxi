# What every module that includes "dispatch.h" in its C code has in common.

cdef extern from "dispatch.h":
    int cpu_level
    int best_level()
    int WITH_OPENMP

cpu_level = best_level()


def _use_level(int level):
    """Choose the instruction set, for tests: 0 baseline, 1 AVX2, 2 AVX-512.

    Returns the level now in force, never above what this processor has.
    """
    global cpu_level
    cpu_level = max(0, min(level, best_level()))
    return cpu_level


def _built_with():
    """The instruction set in force, as `_use_level` counts them; whether with OpenMP."""
    return cpu_level, bool(WITH_OPENMP)


cdef inline int same(Py_ssize_t m, Py_ssize_t n) except -1:
    if m != n:
        raise ValueError(f"arrays do not match: {m} and {n}")
    return 0
