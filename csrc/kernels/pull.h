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
// where S, which is at hand, has (b1 / sqrt(b2))^(i-s) for b1^(i-s): with Adam's default betas 0.05 %
// more from step to step.
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

// Finite also of a broken row.
inline float size(float log_scale) { return expf(fminf(log_scale, 80.0f)); }

// How a row's skipped steps are made up for: w -= S m / (sqrt(v) + eps f), m *= d1, v *= d2.
struct Skip {
    const float *S;
    float f, d1, d2;
};

// Sizes and opacity.
constexpr int kPulled = 4;

// Of one of the two groups, over the steps after `stamp`.
inline float length_of_pull(const SkipTables &t, int64_t stamp, int which, float S) {
    const float sum = (float)(t.sums.now[which] - t.sums.before[kSums * stamp + which]);
    return fmaxf(sum - S, sum * (float)(1.0 - t.beta1));  // which one step has
}

// x of a settled element whose gradient is g: A, its second moment before the gap, eps f, q, slope.
inline float way(float A, float g, float v, float eps_f, float q, float slope) {
    const float y = A * g / (sqrtf(q * v + (1.0f - q) * g * g) + eps_f);
    const float z = slope * y;
    return z < 0.01f ? y * (1.0f - 0.5f * z) : logf(1.0f + z) / slope;
}

// A moment m, and v, of an element whose gradient was g and has become `last`. Where it has grown,
// as that of an opaque row does, v has to have grown with it, or m / sqrt(v) were more than Adam's.
inline void keep_pull(const Skip &skip, float g, float last, float *m, float *v) {
    *m = flush(*m + (1.0f - skip.d1) * last);
    *v = flush(*v + (1.0f - skip.d2) * last * fmaxf(g, last));
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
    const float q = sqrtf(skip.d2 * (float)t.beta2);
    if (t.pull.scale > 0.0f) {
        const float A = length_of_pull(t, stamp, kScaleSum, skip.S[s.scale]);
        for (int i = 0; i < 3; ++i) {
            const int c = s.scale + i;
            const float g = t.pull.scale * size(w[c]);
            const float x = way(A, g, before.v[i], t.eps[c] * skip.f, q, 1.0f);
            w[c] -= x;
            if (m != nullptr) keep_pull(skip, g, t.pull.scale * size(w[c]), m + c, v + c);
        }
    }
    if (t.pull.opacity > 0.0f) {
        const int c = s.opacity;
        const float A = length_of_pull(t, stamp, kOpacitySum, skip.S[c]);
        const float o = sigmoid(w[c]), g = t.pull.opacity * o * (1.0f - o);
        const float slope = fmaxf(1.0f - 2.0f * o, 1e-3f);
        w[c] -= way(A, g, before.v[3], t.eps[c] * skip.f, q, slope);
        const float p = sigmoid(w[c]);
        if (m != nullptr) keep_pull(skip, g, t.pull.opacity * p * (1.0f - p), m + c, v + c);
    }
}

// How far skipped steps may pull an opacity down at most, given its second moment.
inline float drop_to_come(const SkipTables &t, float v) {
    return t.pull.reach > 0.0f ? t.pull.reach / sqrtf(v) : 0.0f;
}

}  // namespace

}  // namespace GSSCALE_ISA
}  // namespace gsscale
