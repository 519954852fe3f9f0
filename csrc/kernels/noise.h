// Noise on means (3D Gaussian Splatting as Markov Chain Monte Carlo), deferred like momentum.
//
// At each step a mean moves by Sigma z g(opacity), times a rate, with z ~ N(0, 1). Independent
// Gaussian steps add up in variance, so skipped ones become a single draw. What is drawn depends on
// nothing but the row as it is stored: however often it is settled from there, it goes the same way.
//
// Like all of csrc/kernels, compiled once per instruction set.
#pragma once

#include <math.h>
#include <string.h>

#include "rows.h"

namespace gsscale {
namespace GSSCALE_ISA {

namespace {

// What a draw depends on: the stored mean, the stamp, and the row's key.
struct Origin {
    uint32_t words[4], key;
};

// Two independent draws of a stored row: one for steps that it skips, one for its own next step.
constexpr uint32_t kSkipped = 0, kOwn = 1;

// Rows more opaque than this stay where they are: g is below 2e-13 there.
constexpr float kOpaqueLogit = -0.85f;

inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline Origin origin_of(const RowStore &s, const float *w) {
    return {{bits_of(w[s.mean]), bits_of(w[s.mean + 1]), bits_of(w[s.mean + 2]),
             bits_of(w[s.stamp])},
            bits_of(w[s.key])};
}

// Philox4x32-10 (Salmon et al. 2011), which Triton has, too.
inline void philox(uint32_t c[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
        const uint32_t c1 = c[1], c3 = c[3];
        c[0] = (uint32_t)(b >> 32) ^ c1 ^ key0;
        c[1] = (uint32_t)b;
        c[2] = (uint32_t)(a >> 32) ^ c3 ^ key1;
        c[3] = (uint32_t)a;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

// In (0, 1), never an end of it; exact in float.
inline float uniform(uint32_t x) { return ((float)(x >> 9) + 0.5f) * 0x1p-23f; }

inline void normals(Origin from, uint32_t which, float z[3]) {
    constexpr float kTurn = 6.28318531f;
    uint32_t *c = from.words;
    philox(c, from.key, which);
    const float far = sqrtf(-2.0f * logf(uniform(c[0]))), turn = kTurn * uniform(c[1]);
    z[0] = far * cosf(turn);
    z[1] = far * sinf(turn);
    z[2] = sqrtf(-2.0f * logf(uniform(c[2]))) * cosf(kTurn * uniform(c[3]));
}

// gsplat's share of the noise by opacity: one half at 0.005, next to nothing from 0.1 on.
inline float faintness(float logit) {
    const float opacity = 1.0f / (1.0f + expf(-logit));
    return 1.0f / (1.0f + expf(100.0f * (opacity - 0.005f)));
}

// Moves the mean of a row `w` by Sigma z g times `deviation`, with the covariance and opacity of w.
// z is isotropic, so it is drawn in the Gaussian's own axes: R S S z. Not inlined, so that it rounds
// in the same way wherever it is called.
__attribute__((noinline)) void disturb(const RowStore &s, const Origin &from, uint32_t which, float deviation,
                    float *w) {
    if (w[s.opacity] > kOpaqueLogit) return;
    float z[3];
    normals(from, which, z);
    const float amount = deviation * faintness(w[s.opacity]);
    for (int i = 0; i < 3; ++i) z[i] *= amount * expf(2.0f * w[s.scale + i]);
    float q[4], square = 0.0f;
    for (int i = 0; i < 4; ++i) square += w[s.quat + i] * w[s.quat + i];
    const float unit = 1.0f / sqrtf(square);
    for (int i = 0; i < 4; ++i) q[i] = w[s.quat + i] * unit;
    const float r = q[0], x = q[1], y = q[2], t = q[3];
    float *mean = w + s.mean;
    mean[0] += (1.0f - 2.0f * (y * y + t * t)) * z[0] + 2.0f * (x * y - r * t) * z[1] +
               2.0f * (x * t + r * y) * z[2];
    mean[1] += 2.0f * (x * y + r * t) * z[0] + (1.0f - 2.0f * (x * x + t * t)) * z[1] +
               2.0f * (y * t - r * x) * z[2];
    mean[2] += 2.0f * (x * t - r * y) * z[0] + 2.0f * (y * t + r * x) * z[1] +
               (1.0f - 2.0f * (x * x + y * y)) * z[2];
}

// Standard deviation of what steps stamp + 1 .. t have added up to, before Sigma and g.
inline float deviation_since(const SkipTables &t, int64_t stamp) {
    return (float)sqrt(t.sums.now[kVarianceSum] - t.sums.before[kSums * stamp + kVarianceSum]);
}

// How far skipped steps may take the mean of a stored row, given the largest scale and the lowest
// opacity that it will have, as logarithm and logit.
inline float distance_to_come(const RowStore &s, const Noise &noise, const float *w,
                              float largest, float lowest) {
    if (lowest > kOpaqueLogit) return 0.0f;
    float z[3];
    normals(origin_of(s, w), kSkipped, z);
    const float length = sqrtf(z[0] * z[0] + z[1] * z[1] + z[2] * z[2]);
    return noise.room * faintness(lowest) * expf(2.0f * largest) * length;
}

}  // namespace

}  // namespace GSSCALE_ISA
}  // namespace gsscale
