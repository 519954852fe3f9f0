// Row kernels: gather settled rows, settle rows in place, settle + Adam step in one pass.
//
// A row is `width` numbers in each of three arrays (params, exp_avg, exp_avg_sq): floats, or, of
// the two moments, bfloat16 with stochastic rounding; see kernels/moments.h. The optimised
// columns come first; the bookkeeping columns follow and hold zeros in both moment arrays, so every
// loop runs over the whole width without a mask: their S, gradient and step size are zero.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace gsscale {

constexpr int64_t kMaxWidth = 128;

struct RowStore {
    float *params;
    void *exp_avg, *exp_avg_sq;  // of float, or of bfloat16 if `narrow`
    float *spheres;  // [capacity, 4] bounding spheres for the culler, or null
    int64_t width;
    bool narrow;
    int32_t mean, scale;                        // first of three columns each
    int32_t quat;                               // first of four columns
    int32_t opacity;
    int32_t stamp, grad2d, count, max_radius, key;  // bookkeeping columns
};

// Sums over all steps up to one, for what moves every row at every step: of (noise rate lr_i)^2, and
// of a_i = lr_i sqrt(1 - beta2^i) / (1 - beta1^i) for scales and for opacities.
constexpr int kVarianceSum = 0, kScaleSum = 1, kOpacitySum = 2, kSums = 3;

struct Sums {
    const double *before;  // [>= t, 3]  up to s; null if nothing moves rows but gradients
    double now[kSums];     // up to t
};

// Noise that each step i adds to means: rate * lr_i standard deviations; see kernels/noise.h.
struct Noise {
    float rate;  // 0 if there is none
    float room;  // bounding spheres hold for that many standard deviations
};

// Penalties whose gradient pulls at every row; see kernels/pull.h.
struct Pull {
    float scale, opacity;  // weight of exp(log-scale) and of opacity; 0 if there is none
    float reach;           // over sqrt(v): how far skipped steps may take an opacity
};

// What Adam did in the steps that a row has skipped (DESIGN: deferred Adam). Current step: t.
struct SkipTables {
    int64_t step;             // t
    int64_t horizon;          // K
    int64_t n_groups;
    const float *skip;        // [K + 1, width]  S(t - k, t) of each column's group
    const float *tail;        // [>= t - K + 1, n_groups]  S(s, s + K), for gaps beyond K
    const float *eps_scale;   // [>= t + 1]  sqrt((1 - beta2^(s+1)) / beta2)
    const float *decay1;      // [K + 1]  beta1^k
    const float *decay2;      // [K + 1]  beta2^k
    const float *eps;         // [width]; 1 in the bookkeeping columns, to keep 0 / 0 out
    const float *reach;       // [width]  bound of S(t, infinity): how far skipped steps can still go
    const int32_t *group;     // [width]  column -> group, n_groups for bookkeeping columns
    double beta1, beta2;
    Sums sums;
    Noise noise;
    Pull pull;
};

// One ordinary step t + 1 of torch.optim.Adam.
struct AdamStep {
    const float *step_size;   // [width]  lr / (1 - beta1^(t+1)); 0 in the bookkeeping columns
    float one_minus_beta1, beta2, one_minus_beta2;
    float inv_sqrt_bias2;     // 1 / sqrt(1 - beta2^(t+1))
    float noise;              // standard deviation of this step's noise
};

// The rows ids[0 .. n - 1]; or, where there is a pick, ids[pick[0 .. n - 1]].
struct Selection {
    const int32_t *ids;
    const int32_t *pick;  // or null
    int64_t n;
};

GSSCALE_FOR_EACH_ISA(
    // out[k, c] = values[k, group[c]] for n rows, 0 where group[c] is n_groups.
    void spread_groups(const double *values, int64_t n, int64_t n_groups, const int32_t *group,
                       int64_t width, float *out);
    // Row i of the selection goes to out[i].
    void gather_settled(const RowStore &store, const SkipTables &tables, const Selection &rows,
                        float *out);
    void settle_range(const RowStore &store, const SkipTables &tables, int64_t begin, int64_t end);
    // `grads` has a row per id. Row i of the selection, once stepped, is also written to forward[i],
    // unless `forward` is null.
    void settle_and_step(const RowStore &store, const SkipTables &tables, const AdamStep &adam,
                         const Selection &rows, const float *grads, float *forward);
    void refresh_spheres(const RowStore &store, const SkipTables &tables, int64_t begin,
                         int64_t end);
    void refresh_spheres_of(const RowStore &store, const SkipTables &tables,
                            const Selection &rows);
    // What densification decides by, of the first n rows as they would be if they were settled:
    // out[0 .. 3] are n floats each: mean 2-D gradient, largest radius, largest log-scale, opacity.
    // The statistics start again from zero.
    void summarize(const RowStore &store, const SkipTables &tables, int64_t n, float *out);
    // Settled opacities of the first n rows become at most `most`, and their moments zero.
    void limit_opacities(const RowStore &store, const SkipTables &tables, int64_t n, float most);)

}  // namespace gsscale
