/* Elements of 128 bits: two words, low word first, aligned as words are. */
#ifndef DIPY_PPIR_U128_H
#define DIPY_PPIR_U128_H

#include <stdint.h>

typedef unsigned __int128 u128 __attribute__((aligned(8), may_alias));
typedef __int128 i128 __attribute__((aligned(8), may_alias));

static inline u128 of_words(uint64_t low, uint64_t high) { return (u128)high << 64 | low; }

/* An element times a small signed integer. */
static inline u128 times(u128 x, int64_t w) {
    uint64_t low = (uint64_t)x, high = (uint64_t)(x >> 64);
    u128 product = (u128)low * (uint64_t)w;
    uint64_t top = (uint64_t)(product >> 64) + high * (uint64_t)w;
    return of_words((uint64_t)product, top - (low & (uint64_t)(w >> 63)));
}

#endif
