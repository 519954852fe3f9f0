// The pull of penalties on size and opacity (3D Gaussian Splatting as Markov Chain Monte Carlo), on
// rows that no view shows: deferred like momentum.
//
// Dense Adam meets the penalty's gradient g at every step. With a_i = lr_i sqrt(1 - b2^i) / (1 - b1^i)
// it moves an element, over the steps s + 1 .. t that a row skips, by
//
//     sum_i a_i (1 - b1^(i-s)) g_i / sqrt(v_i)  ~  A g / D,
//     A = sum_i a_i - S(s, t),
//     D = sqrt(q v_s + (1 - q) g^2),  q = b2^((t-s+1)/2): v in the middle of the gap,
//
// where S, which is at hand, has (b1 / sqrt(b2))^(i-s) for b1^(i-s): 0.05 % more from step to step.
// g falls as the element does, g(w - x) = g e^(-slope x), so the way is x = log(1 + slope A g / D) /
// slope. Where views set v, as they do for what they show now and then, x is small and this is exact
// to some percent; where nothing but the pull does, it tells how soon an element is gone.
//
// Like all of csrc/kernels, compiled once per instruction set.
#pragma once

#include <math.h>

#include "moments.h"
#include "rows.h"

namespace gsscale {
namespace GSSCALE_ISA {

namespace {

inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// How a row's skipped steps are made up for: w -= S m / (sqrt(v) + eps f), m *= d1, v *= d2.
struct Skip {
    const float *S;
    float f, d1, d2;
};

// Sizes and opacity.
constexpr int kPulled = 4;

// Sum of a_i of a group over the steps after `stamp`.
inline float sum_since(const SkipTables &t, int64_t stamp, int which) {
    return (float)(t.sums.now[which] - t.sums.before[kSums * stamp + which]);
}

// Moves a settled element by its pull, of length A; its moments follow, unless they are null. `v` is
// the second moment before the gap.
inline void pull_element(const SkipTables &t, const Skip &skip, float A, bool is_scale, float eps,
                         float v, float *w, float *m, float *v_out) {
    const float weight = is_scale ? t.pull.scale : t.pull.opacity;
    const float o = sigmoid(*w);
    const float g = weight * (is_scale ? expf(*w) : o * (1.0f - o));
    const float slope = is_scale ? 1.0f : fmaxf(1.0f - 2.0f * o, 1e-3f);
    const float q = sqrtf(skip.d2 * (float)t.beta2);
    const float y = A * g / (sqrtf(q * v + (1.0f - q) * g * g) + eps * skip.f);
    const float z = slope * y;
    *w -= z < 0.01f ? y * (1.0f - 0.5f * z) : logf(1.0f + z) / slope;
    if (m == nullptr) return;
    const float p = sigmoid(*w);
    const float last = weight * (is_scale ? expf(*w) : p * (1.0f - p));
    *m = flush(*m + (1.0f - skip.d1) * last);
    *v_out = flush(*v_out + (1.0f - skip.d2) * g * last);
}

// Column of the i-th of the elements of a row that are pulled at.
inline int pulled_column(const RowStore &s, int i) { return i < 3 ? s.scale + i : s.opacity; }

// Their second moments, before the row is settled.
struct PulledMoments {
    float v[kPulled];
};

inline PulledMoments pulled_moments(const RowStore &s, const float *v) {
    PulledMoments kept;
    for (int i = 0; i < kPulled; ++i) kept.v[i] = v[pulled_column(s, i)];
    return kept;
}

// Moves sizes and opacity of a settled row `w` by the pull of the steps that it skipped since
// `stamp` < t. Its settled moments `m` and `v` follow, unless they are null. Not inlined, so that it
// rounds in the same way wherever it is called.
__attribute__((noinline)) void pull_row(const RowStore &s, const SkipTables &t, int64_t stamp,
                                        const Skip &skip, const PulledMoments &before, float *w,
                                        float *m, float *v) {
    for (int i = 0; i < kPulled; ++i) {
        const int c = pulled_column(s, i);
        const float A = sum_since(t, stamp, i < 3 ? kScaleSum : kOpacitySum) - skip.S[c];
        pull_element(t, skip, A, i < 3, t.eps[c], before.v[i], w + c, m ? m + c : nullptr,
                     v ? v + c : nullptr);
    }
}

// How far skipped steps may pull an opacity down at most, given its second moment.
inline float drop_to_come(const SkipTables &t, float v) {
    return t.pull.opacity > 0.0f ? t.pull.reach / sqrtf(v) : 0.0f;
}

}  // namespace

}  // namespace GSSCALE_ISA
}  // namespace gsscale
