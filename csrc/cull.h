// Culling kernels: bounds of blocks of rows, and the ids of rows that meet a convex region.
//
// A sphere is (x, y, z, R); a plane is (nx, ny, nz, d, k). A row is outside of a plane when
//     nx x + ny y + nz z + d + k R < 0,
// a linear form in (x, y, z, R). A block's bound is therefore a box in these four dimensions,
// (min x, y, z, R, max x, y, z, R), and the form's extremes over it are at two of its corners.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace gsscale {

constexpr int kBlockRows = 256;  // consecutive rows that share a bound
constexpr int kBlockWords = kBlockRows / 64;
constexpr int kGroupBlocks = 64;  // blocks that one thread classifies together
constexpr int kMaxPlanes = 32;    // planes are bits of a 32-bit word

static constexpr int64_t blocks_of(int64_t n_rows) {
    return (n_rows + kBlockRows - 1) / kBlockRows;
}
static constexpr int64_t groups_of(int64_t n_blocks) {
    return (n_blocks + kGroupBlocks - 1) / kGroupBlocks;
}

struct Bounds {
    const float *spheres;  // [>= n_rows, 4]
    const float *blocks;   // [>= blocks_of(n_rows), 8]
    int64_t n_rows;
};

// Memory that cull() needs while it runs; none of it has to be initialised.
struct CullScratch {
    uint64_t *hits;   // [n_blocks, kBlockWords]  bit i of a block: its row i is kept
    int64_t *starts;  // [n_groups + 1]           where each group's ids begin in the output
};

GSSCALE_FOR_EACH_ISA(
    void update_all_blocks(const float *spheres, int64_t n_rows, float *blocks, int threads);

    // Recomputes the blocks that hold the rows `ids` (ascending). Ids outside of the n_rows rows
    // are left out, and false is returned if there were any.
    bool update_blocks_of(const float *spheres, int64_t n_rows, const int32_t *ids, int64_t n_ids,
                          float *blocks, int threads);

    // Counts the rows that are inside of all planes and, if `out` has room for them all, writes
    // their ids in ascending order. NaN never counts as outside.
    int64_t cull(const Bounds &bounds, const float *planes, int n_planes,
                 const CullScratch &scratch, int32_t *out, int64_t room, int threads);)

}  // namespace gsscale
