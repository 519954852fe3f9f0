#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>

#include <array>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <vector>

#include "buffers.h"
#include "ids.h"
#include "rows.h"

namespace gsscale {

namespace {

using Columns = nb::ndarray<int32_t, nb::shape<9>, nb::c_contig, nb::device::cpu>;
using Doubles2 = nb::ndarray<double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Moments = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;  // float or int16
using GroupOf = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const char *message) {
    if (!condition) throw std::invalid_argument(message);
}

// The arrays of a host store, kept alive by the references inside.
struct Store {
    Floats2 params;
    Moments exp_avg, exp_avg_sq;
    std::optional<Floats2> spheres;
    RowStore raw;

    Store(Floats2 p, Moments m, Moments v, std::optional<Floats2> sp, Columns columns)
        : params(p), exp_avg(m), exp_avg_sq(v), spheres(sp) {
        const int64_t width = p.shape(1);
        require(width % 16 == 0 && width <= kMaxWidth, "row width must be a multiple of 16, <= 128");
        require(m.shape(0) == p.shape(0) && v.shape(0) == p.shape(0) &&
                    (int64_t)m.shape(1) == width && (int64_t)v.shape(1) == width,
                "params, exp_avg and exp_avg_sq must have the same shape");
        const bool narrow = m.dtype() == nb::dtype<int16_t>();
        require(m.dtype() == v.dtype() && (narrow || m.dtype() == nb::dtype<float>()),
                "both moments must be float32, or bfloat16 as int16");
        require(!sp || (sp->shape(0) >= p.shape(0) && sp->shape(1) == 4),
                "spheres must be [capacity, 4]");
        const int32_t *c = columns.data();
        for (int i = 0; i < 9; ++i) require(c[i] >= 0 && c[i] < width, "column outside of the row");
        raw = {p.data(), m.data(), v.data(), sp ? sp->data() : nullptr, width, narrow,
               c[0],     c[1],     c[2],     c[3], c[4], c[5], c[6], c[7], c[8]};
    }
    int64_t capacity() const { return (int64_t)params.shape(0); }
};

struct Tables {
    Floats2 tail;
    Floats1 eps_scale, decay1, decay2, eps, reach;
    GroupOf group;
    std::optional<Doubles2> sums_before;
    std::vector<float> skip;  // [K + 1, width]: each group's values in each of its columns
    SkipTables raw;

    Tables(int64_t step, Doubles2 skip_, Floats2 tail_, Floats1 eps_scale_, Floats1 decay1_,
           Floats1 decay2_, Floats1 eps_, Floats1 reach_, GroupOf group_, double beta1,
           double beta2, std::optional<Doubles2> sums_before_, std::array<double, kSums> sums_now,
           float noise_rate, float noise_room, float pull_scale, float pull_opacity,
           float pull_reach)
        : tail(tail_), eps_scale(eps_scale_), decay1(decay1_), decay2(decay2_),
          eps(eps_), reach(reach_), group(group_), sums_before(sums_before_) {
        const int64_t horizon = (int64_t)skip_.shape(0) - 1, width = (int64_t)group.shape(0);
        const int64_t n_groups = (int64_t)tail.shape(1);
        require(step >= 0, "step must not be negative");
        require(width <= kMaxWidth && n_groups <= width, "at most 128 columns, a group in each");
        require((int64_t)skip_.shape(1) == n_groups, "skip and tail must have a column per group");
        for (int64_t c = 0; c < width; ++c)
            require(group.data()[c] >= 0 && group.data()[c] <= n_groups, "group out of range");
        require(horizon >= 0 && (int64_t)decay1.shape(0) == horizon + 1 &&
                    (int64_t)decay2.shape(0) == horizon + 1,
                "skip, decay1 and decay2 must have horizon + 1 entries");
        require((int64_t)eps.shape(0) == width && (int64_t)reach.shape(0) == width,
                "eps, reach and group must have one entry per column");
        require((int64_t)eps_scale.shape(0) > step, "eps_scale must cover steps 0 .. step");
        require((int64_t)tail.shape(0) >= step - horizon, "tail must cover steps 0 .. step - K - 1");
        require(!sums_before || ((int64_t)sums_before->shape(0) >= step &&
                                 (int64_t)sums_before->shape(1) == kSums),
                "sums_before must cover steps 0 .. step - 1");
        skip.resize((horizon + 1) * width);
        GSSCALE_DISPATCH(spread_groups, skip_.data(), horizon + 1, n_groups, group.data(), width,
                         skip.data());
        raw = {step,          horizon,       n_groups,   skip.data(),  tail.data(), eps_scale.data(),
               decay1.data(), decay2.data(), eps.data(), reach.data(), group.data(), beta1,
               beta2,
               {sums_before ? sums_before->data() : nullptr, {sums_now[0], sums_now[1], sums_now[2]}},
               {noise_rate, noise_room},
               {pull_scale, pull_opacity, pull_reach}};
    }
};

void check(const Store &store, const Tables &tables) {
    require((int64_t)tables.group.shape(0) == store.raw.width, "tables and rows differ in width");
}

Selection select(const Store &store, const int32_t *ids, int64_t n_ids, const int32_t *pick,
                 int64_t n) {
    if (pick && n > 0) {
        require(ascending(pick, n), "pick must ascend");
        require(pick[0] >= 0 && pick[n - 1] < n_ids, "pick outside of ids");
    }
    require(all_below(store.capacity(), ids, pick, n), "row id outside of the store");
    return {ids, pick, n};
}

void check_range(const Store &store, int64_t begin, int64_t end) {
    require(0 <= begin && begin <= end && end <= store.capacity(), "row range outside of the store");
}

void gather(const Store &store, const Tables &tables, Ids ids, Floats2 out,
            std::optional<Ids> pick) {
    check(store, tables);
    const int64_t n = (int64_t)(pick ? pick->shape(0) : ids.shape(0));
    require((int64_t)out.shape(0) >= n && (int64_t)out.shape(1) == store.raw.width,
            "out must be [>= len(pick or ids), width]");
    const int32_t *picked = pick ? pick->data() : nullptr;
    nb::gil_scoped_release release;
    const Selection rows = select(store, ids.data(), (int64_t)ids.shape(0), picked, n);
    GSSCALE_DISPATCH(gather_settled, store.raw, tables.raw, rows, out.data());
}

void settle(const Store &store, const Tables &tables, int64_t begin, int64_t end) {
    check(store, tables);
    check_range(store, begin, end);
    nb::gil_scoped_release release;
    GSSCALE_DISPATCH(settle_range, store.raw, tables.raw, begin, end);
}

void refresh(const Store &store, const Tables &tables, int64_t begin, int64_t end) {
    check(store, tables);
    check_range(store, begin, end);
    require(store.raw.spheres != nullptr, "this store has no spheres");
    nb::gil_scoped_release release;
    GSSCALE_DISPATCH(refresh_spheres, store.raw, tables.raw, begin, end);
}

void refresh_of(const Store &store, const Tables &tables, Ids ids) {
    check(store, tables);
    require(store.raw.spheres != nullptr, "this store has no spheres");
    nb::gil_scoped_release release;
    const Selection rows = select(store, ids.data(), 0, nullptr, (int64_t)ids.shape(0));
    GSSCALE_DISPATCH(refresh_spheres_of, store.raw, tables.raw, rows);
}

void summary(const Store &store, const Tables &tables, Floats2 out) {
    check(store, tables);
    const int64_t n = (int64_t)out.shape(1);
    require(out.shape(0) == 4 && n <= store.capacity(), "out must be [4, rows in use]");
    nb::gil_scoped_release release;
    GSSCALE_DISPATCH(summarize, store.raw, tables.raw, n, out.data());
}

void limit(const Store &store, const Tables &tables, int64_t n, float most) {
    check(store, tables);
    check_range(store, 0, n);
    nb::gil_scoped_release release;
    GSSCALE_DISPATCH(limit_opacities, store.raw, tables.raw, n, most);
}

void step(const Store &store, const Tables &tables, Ids ids, Floats2 grads, Floats1 lr,
          std::optional<Ids> pick, std::optional<Floats2> forward) {
    check(store, tables);
    const int64_t n = (int64_t)(pick ? pick->shape(0) : ids.shape(0));
    require(grads.shape(0) >= ids.shape(0) && (int64_t)grads.shape(1) == store.raw.width,
            "grads must be [>= len(ids), width]");
    require(!forward || ((int64_t)forward->shape(0) >= n &&
                         (int64_t)forward->shape(1) == store.raw.width),
            "forward must be [>= len(pick or ids), width]");
    require((int64_t)lr.shape(0) == store.raw.width, "lr must have one entry per column");
    const double t = (double)tables.raw.step + 1.0;
    const double bias1 = 1.0 - std::pow(tables.raw.beta1, t);
    const double bias2 = 1.0 - std::pow(tables.raw.beta2, t);
    float step_size[kMaxWidth];
    for (int64_t c = 0; c < store.raw.width; ++c) step_size[c] = (float)(lr.data()[c] / bias1);
    const AdamStep adam{step_size, (float)(1.0 - tables.raw.beta1), (float)tables.raw.beta2,
                        (float)(1.0 - tables.raw.beta2), (float)(1.0 / std::sqrt(bias2)),
                        tables.raw.noise.rate * lr.data()[store.raw.mean]};
    const int32_t *picked = pick ? pick->data() : nullptr;
    float *stepped = forward ? forward->data() : nullptr;
    nb::gil_scoped_release release;
    const Selection rows = select(store, ids.data(), (int64_t)ids.shape(0), picked, n);
    GSSCALE_DISPATCH(settle_and_step, store.raw, tables.raw, adam, rows, grads.data(), stepped);
}

}  // namespace

void bind_rows(nb::module_ &m) {
    // noconvert: nanobind would otherwise hand us a converted copy and lose what we write to it.
    nb::class_<Store>(m, "Rows")
        .def(nb::init<Floats2, Moments, Moments, std::optional<Floats2>, Columns>(),
             nb::arg("params").noconvert(), nb::arg("exp_avg").noconvert(), nb::arg("exp_avg_sq").noconvert(),
             nb::arg("spheres").noconvert().none(), nb::arg("columns").noconvert());
    nb::class_<Tables>(m, "SkipTables")
        .def(nb::init<int64_t, Doubles2, Floats2, Floats1, Floats1, Floats1, Floats1, Floats1,
                      GroupOf, double, double, std::optional<Doubles2>, std::array<double, kSums>,
                      float, float, float, float, float>(),
             nb::arg("step"), nb::arg("skip").noconvert(), nb::arg("tail").noconvert(), nb::arg("eps_scale").noconvert(),
             nb::arg("decay1").noconvert(), nb::arg("decay2").noconvert(), nb::arg("eps").noconvert(), nb::arg("reach").noconvert(),
             nb::arg("group").noconvert(), nb::arg("beta1"), nb::arg("beta2"),
             nb::arg("sums_before").noconvert().none() = nb::none(),
             nb::arg("sums_now") = std::array<double, kSums>{}, nb::arg("noise_rate") = 0.0f,
             nb::arg("noise_room") = 0.0f, nb::arg("pull_scale") = 0.0f,
             nb::arg("pull_opacity") = 0.0f, nb::arg("pull_reach") = 0.0f)
        .def_prop_ro("step", [](const Tables &tables) { return tables.raw.step; });
    m.def("gather_settled", &gather, nb::arg("rows"), nb::arg("tables"), nb::arg("ids").noconvert(),
          nb::arg("out").noconvert(), nb::arg("pick").noconvert().none() = nb::none(),
          "Settled params of the rows `ids`, or ids[pick], into the rows of `out`; the store is not "
          "written.");
    m.def("settle_range", &settle, nb::arg("rows"), nb::arg("tables"), nb::arg("begin"),
          nb::arg("end"), "Settle rows begin .. end - 1 in place, to the tables' step.");
    m.def("refresh_spheres", &refresh, nb::arg("rows"), nb::arg("tables"), nb::arg("begin"),
          nb::arg("end"), "Recompute the bounding spheres of rows begin .. end - 1.");
    m.def("refresh_spheres_of", &refresh_of, nb::arg("rows"), nb::arg("tables"),
          nb::arg("ids").noconvert(), "Recompute the bounding spheres of the rows `ids`.");
    m.def("summarize", &summary, nb::arg("rows"), nb::arg("tables"), nb::arg("out").noconvert(),
          "Mean 2-D gradient, largest radius, largest log-scale and opacity logit, settled, of the "
          "first n rows, into `out` [4, n]; their statistics become zero.");
    m.def("limit_opacities", &limit, nb::arg("rows"), nb::arg("tables"), nb::arg("n"),
          nb::arg("most"),
          "Clamp the settled opacity logits of the first n rows and zero their moments; the rows' "
          "stamps and other columns stay.");
    m.def("settle_and_step", &step, nb::arg("rows"), nb::arg("tables"), nb::arg("ids").noconvert(),
          nb::arg("grads").noconvert(), nb::arg("lr").noconvert(),
          nb::arg("pick").noconvert().none() = nb::none(),
          nb::arg("forward").noconvert().none() = nb::none(),
          "Settle the rows `ids` to the tables' step t, then apply Adam step t + 1 with `grads`, a "
          "row per id. With `pick` (ascending positions), only the rows ids[pick]. The rows' params "
          "after the step are also written to `forward`, one after the other.");
}

}  // namespace gsscale
