/* One source, several instruction sets: `name_body` is always inlined, so each
   wrapper recompiles it for its own target. Chosen by hand when a module is imported,
   and not with target_clones, which needs ifunc (absent from musl and macOS) and would
   not let the tests reach the slower paths. */
#ifndef DIPY_PPIR_DISPATCH_H
#define DIPY_PPIR_DISPATCH_H

#include <stdint.h>

#define ALWAYS static inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_TARGETS 1
#include <immintrin.h>
#define TARGET_2 __attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")))
#define TARGET_1 __attribute__((target("avx2,fma")))
#else
#define HAVE_TARGETS 0
#define TARGET_2
#define TARGET_1
#endif

#ifdef _OPENMP
#define WITH_OPENMP 1
#else
#define WITH_OPENMP 0
#endif

/* 0 baseline, 1 AVX2, 2 AVX-512. */
static int cpu_level = 0;

static int best_level(void) {
#if HAVE_TARGETS
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return 0;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
        return 2;
    return 1;
#else
    return 0;
#endif
}

#define DISPATCH(name, PARAMS, ARGS)                                         \
    TARGET_2 static int64_t name##_2 PARAMS { return name##_body ARGS; }     \
    TARGET_1 static int64_t name##_1 PARAMS { return name##_body ARGS; }     \
    static int64_t name##_0 PARAMS { return name##_body ARGS; }              \
    static int64_t name PARAMS {                                             \
        if (cpu_level == 2) return name##_2 ARGS;                            \
        if (cpu_level == 1) return name##_1 ARGS;                            \
        return name##_0 ARGS;                                                \
    }

#endif
