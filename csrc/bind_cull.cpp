#include <nanobind/stl/optional.h>
#include <omp.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>

#include "buffers.h"
#include "cull.h"
#include "ids.h"

namespace gsscale {

namespace {

void check_bounds(const Floats2 &spheres, const Floats2 &blocks, int64_t n_rows) {
    if (spheres.shape(1) != 4 || blocks.shape(1) != 8)
        throw std::invalid_argument("spheres must be [rows, 4] and blocks [blocks, 8]");
    if (n_rows < 0 || n_rows > (int64_t)spheres.shape(0) ||
        n_rows > std::numeric_limits<int32_t>::max())
        throw std::invalid_argument("n_rows outside of spheres, or beyond 32-bit row ids");
    if (blocks_of(n_rows) > (int64_t)blocks.shape(0))
        throw std::invalid_argument("blocks must have room for one bound per 256 rows");
}

// Work from which all threads pay, about 0.2 ms: one that must first get a core, because a data
// loader has them all, costs more than it brings. All or one, see ids.h.
constexpr int64_t kGroupsToBound = 16, kGroupsToCull = 128, kIdsToScan = 1 << 16;

int threads_for(int64_t work, int64_t enough, int threads) {
    if (threads > 0) return threads;
    return work < enough ? 1 : omp_get_max_threads();
}

void update(Floats2 spheres, Floats2 blocks, int64_t n_rows, std::optional<Ids> ids, int threads) {
    check_bounds(spheres, blocks, n_rows);
    const float *from = spheres.data();
    float *to = blocks.data();
    nb::gil_scoped_release release;
    if (!ids) {
        const int n_threads = threads_for(groups_of(blocks_of(n_rows)), kGroupsToBound, threads);
        GSSCALE_DISPATCH(update_all_blocks, from, n_rows, to, n_threads);
        return;
    }
    const int64_t n_ids = (int64_t)ids->shape(0);
    const int n_threads = threads_for(n_ids, kIdsToScan, threads);
    if (!GSSCALE_DISPATCH(update_blocks_of, from, n_rows, ids->data(), n_ids, to, n_threads))
        throw std::invalid_argument("row id outside of the first n_rows rows");
}

void replace_spheres(Floats2 spheres, int64_t n_rows, Ids ids, Floats2 values, int threads) {
    const int64_t n = (int64_t)ids.shape(0);
    if (spheres.shape(1) != 4 || values.shape(1) != 4 || (int64_t)values.shape(0) < n)
        throw std::invalid_argument("spheres must be [rows, 4] and the new ones [>= len(ids), 4]");
    if (n_rows < 0 || n_rows > (int64_t)spheres.shape(0))
        throw std::invalid_argument("n_rows outside of spheres");
    const int32_t *id = ids.data();
    const float *from = values.data();
    float *to = spheres.data();
    nb::gil_scoped_release release;
    if (!all_below(n_rows, id, nullptr, n))
        throw std::invalid_argument("row id outside of the first n_rows rows");
    const int n_threads = threads_for(n, kIdsToScan, threads);
#pragma omp parallel for schedule(static) num_threads(n_threads)
    for (int64_t i = 0; i < n; ++i) std::copy_n(from + 4 * i, 4, to + 4 * (int64_t)id[i]);
}

int64_t cull_rows(Floats2 spheres, Floats2 blocks, int64_t n_rows, Floats2 planes, Ids out,
                  int threads) {
    check_bounds(spheres, blocks, n_rows);
    if (planes.shape(1) != 5 || planes.shape(0) > kMaxPlanes)
        throw std::invalid_argument("planes must be [at most 32, 5]");
    const int64_t n_blocks = blocks_of(n_rows), n_groups = groups_of(n_blocks);
    const Bounds bounds{spheres.data(), blocks.data(), n_rows};
    // Per call, so that two threads may cull at once; pages that no hit falls into stay untouched.
    const std::unique_ptr<uint64_t[]> hits(new uint64_t[n_blocks * kBlockWords]);
    const std::unique_ptr<int64_t[]> starts(new int64_t[n_groups + 1]);
    const CullScratch scratch{hits.get(), starts.get()};
    nb::gil_scoped_release release;
    return GSSCALE_DISPATCH(cull, bounds, planes.data(), (int)planes.shape(0), scratch, out.data(),
                            (int64_t)out.shape(0), threads_for(n_groups, kGroupsToCull, threads));
}

}  // namespace

void bind_cull(nb::module_ &m) {
    // noconvert: nanobind would otherwise hand us a converted copy and lose what we write to it.
    m.attr("BLOCK_ROWS") = kBlockRows;
    m.def("update_blocks", &update, nb::arg("spheres").noconvert(), nb::arg("blocks").noconvert(),
          nb::arg("n_rows"), nb::arg("row_ids").noconvert().none() = nb::none(),
          nb::arg("threads") = 0,
          "Recompute the bounds [blocks, 8] of all blocks of the first n_rows spheres [n, 4], or "
          "of those blocks that hold the rows `row_ids` (ascending).");
    m.def("replace_spheres", &replace_spheres, nb::arg("spheres").noconvert(), nb::arg("n_rows"),
          nb::arg("ids").noconvert(), nb::arg("values").noconvert(), nb::arg("threads") = 0,
          "Write the spheres [n, 4] of the rows `ids`; their blocks' bounds are not touched.");
    m.def("cull", &cull_rows, nb::arg("spheres").noconvert(), nb::arg("blocks").noconvert(),
          nb::arg("n_rows"), nb::arg("planes").noconvert(), nb::arg("out").noconvert(),
          nb::arg("threads") = 0,
          "Write the ids of the rows that are outside of none of the planes [P, 5], ascending, to "
          "`out` and return how many they are; nothing is written if `out` is too small for them.");
}

}  // namespace gsscale
