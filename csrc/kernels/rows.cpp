// Compiled once per instruction set: no std:: templates here, or the linker could keep a copy that
// was compiled for AVX-512 and call it on an older CPU.
#include "rows.h"

#include "moments.h"
#include "noise.h"
#include "pull.h"

#include <math.h>
#include <omp.h>
#include <string.h>

namespace gsscale {
namespace GSSCALE_ISA {

namespace {

// Rows ahead whose cache lines are requested: a row is 12 lines (8 if narrow) in three arrays, too
// scattered for the hardware prefetcher when ids have gaps.
constexpr int64_t kAhead = 6;
constexpr int64_t kFarAhead = 24;  // where a row takes next to no time
// Rows from which all threads pay: waking one costs more than stepping some hundred rows.
constexpr int64_t kRowsForThreads = 4096;
// gsplat draws a Gaussian out to 3 (1.4) or 3.33 (1.5) standard deviations.
constexpr float kSigmas = 3.33f;
constexpr float kCoordinateSlack = 1e-6f;

inline int threads_for(int64_t rows) { return rows < kRowsForThreads ? 1 : omp_get_max_threads(); }

inline void prefetch_row(const RowStore &s, int64_t row) {
    const int64_t at = row * s.width;
    for (int64_t c = 0; c < s.width; c += 16) __builtin_prefetch(s.params + at + c, 1);
    const int64_t size = moment_bytes(s);
    for (int64_t c = 0; c < s.width; c += 64 / size) {
        __builtin_prefetch((const char *)s.exp_avg + (at + c) * size, 1);
        __builtin_prefetch((const char *)s.exp_avg_sq + (at + c) * size, 1);
    }
}

inline Skip skip_of(const SkipTables &t, int64_t width, int64_t stamp, float *scratch) {
    const int64_t gap = t.step - stamp;
    Skip skip;
    skip.f = t.eps_scale[stamp];
    if (gap <= t.horizon) {
        skip.S = t.skip + gap * width;
        skip.d1 = t.decay1[gap];
        skip.d2 = t.decay2[gap];
    } else {
        // S(s, t) = S(s, s + K): the terms beyond K are below rounding.
        const float *tail = t.tail + stamp * t.n_groups;
        for (int64_t c = 0; c < width; ++c)
            scratch[c] = t.group[c] < t.n_groups ? tail[t.group[c]] : 0.0f;
        skip.S = scratch;
        skip.d1 = (float)pow(t.beta1, (double)gap);
        skip.d2 = (float)pow(t.beta2, (double)gap);
    }
    return skip;
}

inline void settle_row(const Skip &skip, const float *eps, int64_t width, float *__restrict__ w,
                       float *__restrict__ m, float *__restrict__ v) {
    const float *__restrict__ S = skip.S;
    const float f = skip.f, d1 = skip.d1, d2 = skip.d2;
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) {
        w[c] -= S[c] * m[c] / (sqrtf(v[c]) + eps[c] * f);
        m[c] = flush(m[c] * d1);
        v[c] = flush(v[c] * d2);
    }
}

// What moves every row at every step, for the steps since `stamp` that a settled row has skipped: the
// penalties' pull, then noise, by the size and opacity that are left. `origin` and `before` are of
// the row as it was; moments may be null.
inline void push_skipped(const RowStore &s, const SkipTables &t, int64_t stamp, const Skip &skip,
                         const Origin &origin, const PulledMoments &before, float *w, float *m,
                         float *v) {
    if (t.pull.scale > 0.0f || t.pull.opacity > 0.0f)
        pull_row(s, t, stamp, skip, before, w, m, v);
    if (t.noise.rate > 0.0f) disturb(s, origin, kSkipped, deviation_since(t, stamp), w);
}

// Bounding sphere for the culler, wide enough for every step that may be skipped from here on:
// without a gradient an element moves monotonically towards w - S(t, inf) m / (sqrt(v) + eps).
inline void write_sphere(const RowStore &s, const SkipTables &t, int64_t row) {
    const int64_t at = row * s.width;
    const float *w = s.params + at;
    const auto m = [&](int c) { return moment(s, s.exp_avg, at + c); };
    const auto root = [&](int c) { return sqrtf(moment(s, s.exp_avg_sq, at + c)); };
    // The denominator's eps factor grows with the step, so the current one bounds the motion.
    const float f = t.eps_scale[t.step];
    float moved = 0.0f, far = 0.0f, largest = -INFINITY;
    for (int i = 0; i < 3; ++i) {
        const int c = s.mean + i;
        const float motion = t.reach[c] * m(c) / (root(c) + t.eps[c] * f);
        moved += motion * motion;
        far += fabsf(w[c]);
        const int k = s.scale + i;
        const float shrink = t.reach[k] * m(k) / (root(k) + t.eps[k] * f);
        const float reached = shrink < 0.0f ? w[k] - shrink : w[k];
        // NaN wins and stays: the culler keeps a broken row rather than dropping it silently.
        if (!(largest >= reached)) largest = largest != largest ? largest : reached;
    }
    float noise = 0.0f;
    if (t.noise.rate > 0.0f) {
        const int k = s.opacity;
        const float drop = t.reach[k] * m(k) / (root(k) + t.eps[k] * f);
        const float lowest = w[k] - fmaxf(drop, 0.0f) - drop_to_come(t, moment(s, s.exp_avg_sq, at + k));
        noise = distance_to_come(s, t.noise, w, largest, lowest);
    }
    float *sphere = s.spheres + row * 4;
    sphere[0] = w[s.mean];
    sphere[1] = w[s.mean + 1];
    sphere[2] = w[s.mean + 2];
    sphere[3] = kSigmas * expf(largest) + sqrtf(moved) + kCoordinateSlack * far + noise;
}

// One column of the row that starts at `at`, as it would be if the row were settled. At gap 0 S is 0.
inline float settled(const RowStore &s, const SkipTables &t, int64_t stamp, int64_t at, int c) {
    const int64_t gap = t.step - stamp;
    const float S = gap <= t.horizon ? t.skip[gap * s.width + c]
                                     : t.tail[stamp * t.n_groups + t.group[c]];
    return s.params[at + c] -
           S * moment(s, s.exp_avg, at + c) /
               (sqrtf(moment(s, s.exp_avg_sq, at + c)) + t.eps[c] * t.eps_scale[stamp]);
}

// The four cache lines of a row that `summarize` reads, of which it writes one.
inline void prefetch_summary(const RowStore &s, int64_t row) {
    const int64_t at = row * s.width;
    __builtin_prefetch(s.params + at + s.scale);
    __builtin_prefetch(s.params + at + s.stamp, 1);
    const int64_t size = moment_bytes(s);
    __builtin_prefetch((const char *)s.exp_avg + (at + s.scale) * size);
    __builtin_prefetch((const char *)s.exp_avg_sq + (at + s.scale) * size);
}

// Position in ids of the i-th row of the selection.
inline int64_t place_of(const Selection &rows, int64_t i) { return rows.pick ? rows.pick[i] : i; }

inline void prefetch_ahead(const RowStore &s, const Selection &rows, int64_t i) {
    if (i + kAhead < rows.n) prefetch_row(s, rows.ids[place_of(rows, i + kAhead)]);
}

inline int64_t stamp_of(const RowStore &s, const float *w) { return (int64_t)w[s.stamp]; }

}  // namespace

void spread_groups(const double *values, int64_t n, int64_t n_groups, const int32_t *group,
                   int64_t width, float *out) {
    float of_group[kMaxWidth + 1];
    of_group[n_groups] = 0.0f;
    for (int64_t k = 0; k < n; ++k) {
        for (int64_t g = 0; g < n_groups; ++g) of_group[g] = (float)values[k * n_groups + g];
        for (int64_t c = 0; c < width; ++c) out[k * width + c] = of_group[group[c]];
    }
}

void gather_settled(const RowStore &s, const SkipTables &t, const Selection &rows, float *out) {
    const int64_t width = s.width;
#pragma omp parallel for schedule(static) num_threads(threads_for(rows.n))
    for (int64_t i = 0; i < rows.n; ++i) {
        prefetch_ahead(s, rows, i);
        const int64_t at = rows.ids[place_of(rows, i)] * width;
        float *__restrict__ o = out + i * width;
        const float *__restrict__ w = s.params + at;
        const int64_t stamp = stamp_of(s, w);
        if (stamp == t.step) {
            memcpy(o, w, width * sizeof(float));
            continue;
        }
        float scratch[kMaxWidth];
        const Skip skip = skip_of(t, width, stamp, scratch);
        const float *__restrict__ S = skip.S;
        float m_scratch[kMaxWidth], v_scratch[kMaxWidth];
        const float *__restrict__ m = moments_of(s, s.exp_avg, at, m_scratch);
        const float *__restrict__ v = moments_of(s, s.exp_avg_sq, at, v_scratch);
        const float *__restrict__ eps = t.eps;
#pragma omp simd
        for (int64_t c = 0; c < width; ++c)
            o[c] = w[c] - S[c] * m[c] / (sqrtf(v[c]) + eps[c] * skip.f);
        if (t.sums.before)
            push_skipped(s, t, stamp, skip, origin_of(s, w), pulled_moments(s, v), o, nullptr, nullptr);
    }
}

void settle_range(const RowStore &s, const SkipTables &t, int64_t begin, int64_t end) {
#pragma omp parallel for schedule(static) num_threads(threads_for(end - begin))
    for (int64_t row = begin; row < end; ++row) {
        const int64_t at = row * s.width;
        float *w = s.params + at;
        const int64_t stamp = stamp_of(s, w);
        if (stamp == t.step) continue;
        float scratch[kMaxWidth];
        const Skip skip = skip_of(t, s.width, stamp, scratch);
        const Origin origin = origin_of(s, w);
        float m_scratch[kMaxWidth], v_scratch[kMaxWidth];
        float *m = moments_of(s, s.exp_avg, at, m_scratch);
        float *v = moments_of(s, s.exp_avg_sq, at, v_scratch);
        const PulledMoments before = pulled_moments(s, v);
        settle_row(skip, t.eps, s.width, w, m, v);
        if (t.sums.before) push_skipped(s, t, stamp, skip, origin, before, w, m, v);
        keep_moments(s, at, t.step, m, v);
        w[s.stamp] = (float)t.step;
    }
}

void settle_and_step(const RowStore &s, const SkipTables &t, const AdamStep &a,
                     const Selection &rows, const float *grads, float *forward) {
    const int64_t width = s.width;
#pragma omp parallel for schedule(static) num_threads(threads_for(rows.n))
    for (int64_t i = 0; i < rows.n; ++i) {
        prefetch_ahead(s, rows, i);
        const int64_t place = place_of(rows, i), row = rows.ids[place], at = row * width;
        float *__restrict__ w = s.params + at;
        float m_scratch[kMaxWidth], v_scratch[kMaxWidth];
        float *__restrict__ m = moments_of(s, s.exp_avg, at, m_scratch);
        float *__restrict__ v = moments_of(s, s.exp_avg_sq, at, v_scratch);
        const int64_t stamp = stamp_of(s, w);
        const Origin origin = origin_of(s, w);
        if (stamp != t.step) {
            float scratch[kMaxWidth];
            const Skip skip = skip_of(t, width, stamp, scratch);
            const PulledMoments before = pulled_moments(s, v);
            settle_row(skip, t.eps, width, w, m, v);
            if (t.sums.before) push_skipped(s, t, stamp, skip, origin, before, w, m, v);
        }
        // The gradient row carries the view's densification statistics in the bookkeeping columns.
        float g[kMaxWidth];
        memcpy(g, grads + place * width, width * sizeof(float));
        const float radius = g[s.max_radius];
        w[s.grad2d] += g[s.grad2d];
        w[s.count] += g[s.count];
        w[s.max_radius] = radius > w[s.max_radius] ? radius : w[s.max_radius];
        g[s.grad2d] = g[s.count] = g[s.max_radius] = g[s.stamp] = 0.0f;
        const float *__restrict__ step_size = a.step_size;
        const float *__restrict__ eps = t.eps;
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) {
            const float mc = m[c] + (g[c] - m[c]) * a.one_minus_beta1;
            const float vc = v[c] * a.beta2 + g[c] * g[c] * a.one_minus_beta2;
            w[c] -= step_size[c] * mc / (sqrtf(vc) * a.inv_sqrt_bias2 + eps[c]);
            m[c] = flush(mc);
            v[c] = flush(vc);
        }
        keep_moments(s, at, t.step + 1, m, v);
        if (t.noise.rate > 0.0f) disturb(s, origin, kOwn, a.noise, w);
        w[s.stamp] = (float)(t.step + 1);
        if (forward) memcpy(forward + i * width, w, width * sizeof(float));
        if (s.spheres) write_sphere(s, t, row);
    }
}

void refresh_spheres(const RowStore &s, const SkipTables &t, int64_t begin, int64_t end) {
#pragma omp parallel for schedule(static) num_threads(threads_for(end - begin))
    for (int64_t row = begin; row < end; ++row) write_sphere(s, t, row);
}

void refresh_spheres_of(const RowStore &s, const SkipTables &t, const Selection &rows) {
#pragma omp parallel for schedule(static) num_threads(threads_for(rows.n))
    for (int64_t i = 0; i < rows.n; ++i) write_sphere(s, t, rows.ids[place_of(rows, i)]);
}

void summarize(const RowStore &s, const SkipTables &t, int64_t n, float *out) {
#pragma omp parallel for schedule(static) num_threads(threads_for(n))
    for (int64_t row = 0; row < n; ++row) {
        const int64_t at = row * s.width;
        float *w = s.params + at;
        if (row + kFarAhead < n) prefetch_summary(s, row + kFarAhead);
        const int64_t stamp = stamp_of(s, w);
        float largest = settled(s, t, stamp, at, s.scale);
        for (int c = s.scale + 1; c < s.scale + 3; ++c) {
            const float scale = settled(s, t, stamp, at, c);
            if (!(largest >= scale)) largest = largest != largest ? largest : scale;
        }
        out[row] = w[s.grad2d] / (w[s.count] > 1.0f ? w[s.count] : 1.0f);
        out[n + row] = w[s.max_radius];
        out[2 * n + row] = largest;
        out[3 * n + row] = settled(s, t, stamp, at, s.opacity);
        w[s.grad2d] = w[s.count] = w[s.max_radius] = 0.0f;
    }
}

void limit_opacities(const RowStore &s, const SkipTables &t, int64_t n, float most) {
#pragma omp parallel for schedule(static) num_threads(threads_for(n))
    for (int64_t row = 0; row < n; ++row) {
        const int64_t at = row * s.width, opacity = at + s.opacity;
        const float now = settled(s, t, stamp_of(s, s.params + at), at, s.opacity);
        // Without moments it will not move until its next gradient, whatever the row's stamp says.
        s.params[opacity] = now > most ? most : now;
        clear_moment(s, s.exp_avg, opacity);
        clear_moment(s, s.exp_avg_sq, opacity);
    }
}

}  // namespace GSSCALE_ISA
}  // namespace gsscale
