// Adam's moments as they are stored: in place as floats, or as bfloat16, the upper half of a float.
//
// An average with beta2 = 0.999 moves by less than half a bfloat16's last place in most steps: to
// the nearest, it would stand still. So what is cut off is rounded up with the probability of its
// share, and is right in the mean (stochastic rounding). Zero stays zero.
//
// Like all of csrc/kernels, compiled once per instruction set.
#pragma once

#include <math.h>
#include <string.h>

#include "rows.h"

namespace gsscale {
namespace GSSCALE_ISA {

namespace {

constexpr float kSmallestNormal = 1.17549435e-38f;

// Denormals would never end decaying.
inline float flush(float x) { return fabsf(x) < kSmallestNormal ? 0.0f : x; }

inline float from_upper_half(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// 32 random bits of a row, a column and a step (Wellons' lowbias32): 16 for either moment.
inline uint32_t random_bits(uint32_t key, int64_t column, int64_t step) {
    uint32_t x = key + (uint32_t)column * 0x85EBCA6Bu + (uint32_t)step * 0x9E3779B9u;
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    return x ^ x >> 16;
}

// `random` is below 2^16.
inline uint16_t rounded(float x, uint32_t random) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    // What is not a number could become one by a carry.
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0 : (uint16_t)((bits + random) >> 16);
}

inline int64_t moment_bytes(const RowStore &s) { return s.narrow ? 2 : 4; }

// One element of a moment's array.
inline float moment(const RowStore &s, const void *array, int64_t i) {
    return s.narrow ? from_upper_half(((const uint16_t *)array)[i]) : ((const float *)array)[i];
}

inline void clear_moment(const RowStore &s, void *array, int64_t i) {
    if (s.narrow)
        ((uint16_t *)array)[i] = 0;
    else
        ((float *)array)[i] = 0.0f;
}

// A row of a moment's array that begins at `at`: where it is, or else in `scratch`.
inline float *moments_of(const RowStore &s, void *array, int64_t at, float *__restrict__ scratch) {
    if (!s.narrow) return (float *)array + at;
    const uint16_t *__restrict__ from = (const uint16_t *)array + at;
#pragma omp simd
    for (int64_t c = 0; c < s.width; ++c) scratch[c] = from_upper_half(from[c]);
    return scratch;
}

// Both moments of a row back to where moments_of() had them from, as they are after `step`. The
// row's key decides how they are rounded, so that it does not matter where the row is.
inline void keep_moments(const RowStore &s, int64_t at, int64_t step, const float *__restrict__ m,
                         const float *__restrict__ v) {
    if (!s.narrow) return;
    uint32_t key;
    memcpy(&key, s.params + at + s.key, sizeof key);
    uint16_t *__restrict__ first = (uint16_t *)s.exp_avg + at;
    uint16_t *__restrict__ second = (uint16_t *)s.exp_avg_sq + at;
#pragma omp simd
    for (int64_t c = 0; c < s.width; ++c) {
        const uint32_t random = random_bits(key, c, step);
        first[c] = rounded(m[c], random & 0xFFFFu);
        second[c] = rounded(v[c], random >> 16);
    }
}

}  // namespace

}  // namespace GSSCALE_ISA
}  // namespace gsscale
