// Compiled once per instruction set: no std:: templates here, or the linker could keep a copy that
// was compiled for AVX-512 and call it on an older CPU.
//
// Built with -ffp-contract=off. Every instruction set then rounds alike and gives the same ids, and
// `margin` is monotonic in each input even after rounding, so a block that is skipped or taken
// whole holds no row that the row test would have decided otherwise.
#include "cull.h"

#include <math.h>
#include <string.h>

namespace gsscale {
namespace GSSCALE_ISA {

namespace {

inline float margin(const float *plane, float x, float y, float z, float r) {
    return plane[0] * x + plane[1] * y + plane[2] * z + plane[3] + plane[4] * r;
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

void bound_block(const float *spheres, int64_t n_rows, int64_t block, float *blocks) {
    const int64_t first = block * kBlockRows, rows = least(kBlockRows, n_rows - first);
    const float *s = spheres + first * 4;
    float x0 = INFINITY, y0 = INFINITY, z0 = INFINITY, r0 = INFINITY;
    float x1 = -INFINITY, y1 = -INFINITY, z1 = -INFINITY, r1 = -INFINITY;
    int nan = 0;
#pragma omp simd reduction(min : x0, y0, z0, r0) reduction(max : x1, y1, z1, r1) reduction(| : nan)
    for (int64_t i = 0; i < rows; ++i) {
        const float x = s[4 * i], y = s[4 * i + 1], z = s[4 * i + 2], r = s[4 * i + 3];
        x0 = x < x0 ? x : x0;
        y0 = y < y0 ? y : y0;
        z0 = z < z0 ? z : z0;
        r0 = r < r0 ? r : r0;
        x1 = x > x1 ? x : x1;
        y1 = y > y1 ? y : y1;
        z1 = z > z1 ? z : z1;
        r1 = r > r1 ? r : r1;
        nan |= (x != x) | (y != y) | (z != z) | (r != r);
    }
    const float box[8] = {x0, y0, z0, r0, x1, y1, z1, r1};
    float *out = blocks + block * 8;
    // Comparisons skip NaN; an infinite box sends such a block to the row test, which keeps NaN.
    for (int c = 0; c < 8; ++c) out[c] = !nan ? box[c] : c < 4 ? -INFINITY : INFINITY;
}

// For each of `count` blocks: is it outside of some plane, and which planes cut it (one bit each)?
void classify(const float *blocks, int count, const float *planes, int n_planes, uint32_t *outside,
              uint32_t *cut) {
    float box[8][kGroupBlocks];
    for (int b = 0; b < count; ++b)
        for (int c = 0; c < 8; ++c) box[c][b] = blocks[8 * b + c];
    memset(outside, 0, count * sizeof *outside);
    memset(cut, 0, count * sizeof *cut);
    for (int p = 0; p < n_planes; ++p) {
        const float *plane = planes + 5 * p;
        const float slope[4] = {plane[0], plane[1], plane[2], plane[4]};
        const float *high[4], *low[4];
        for (int c = 0; c < 4; ++c) {
            high[c] = box[slope[c] < 0.0f ? c : 4 + c];
            low[c] = box[slope[c] < 0.0f ? 4 + c : c];
        }
#pragma omp simd
        for (int b = 0; b < count; ++b) {
            const float largest = margin(plane, high[0][b], high[1][b], high[2][b], high[3][b]);
            const float smallest = margin(plane, low[0][b], low[1][b], low[2][b], low[3][b]);
            outside[b] |= largest < 0.0f ? 1u : 0u;
            cut[b] |= smallest >= 0.0f ? 0u : 1u << p;
        }
    }
}

// Bit i of `hits`: row i of the block is outside of none of the planes in `cut`. Returns how many.
int test_rows(const float *s, int rows, const float *planes, uint32_t cut, uint64_t *hits) {
    uint32_t kept[kBlockRows];
    for (int i = 0; i < kBlockRows; ++i) kept[i] = i < rows;
    for (; cut != 0; cut &= cut - 1) {
        const float *plane = planes + 5 * __builtin_ctz(cut);
#pragma omp simd
        for (int i = 0; i < rows; ++i)
            kept[i] &=
                margin(plane, s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3]) < 0.0f ? 0u : 1u;
    }
    int count = 0;
    for (int w = 0; w < kBlockWords; ++w) {
        uint64_t word = 0;
#pragma omp simd reduction(| : word)
        for (int i = 0; i < 64; ++i) word |= (uint64_t)kept[64 * w + i] << i;
        hits[w] = word;
        count += __builtin_popcountll(word);
    }
    return count;
}

// Marks the kept rows of one group of blocks. Returns how many; `hits` is only written if any.
int64_t mark_group(const Bounds &in, const float *planes, int n_planes, int64_t first, int count,
                   uint64_t *hits) {
    uint32_t outside[kGroupBlocks], cut[kGroupBlocks];
    classify(in.blocks + first * 8, count, planes, n_planes, outside, cut);
    uint32_t all = 1;
    for (int b = 0; b < count; ++b) all &= outside[b];
    if (all) return 0;
    int64_t total = 0;
    for (int b = 0; b < count; ++b) {
        const int64_t row = (first + b) * kBlockRows;
        const int rows = (int)least(kBlockRows, in.n_rows - row);
        uint64_t *mine = hits + (first + b) * kBlockWords;
        if (outside[b]) {
            memset(mine, 0x00, kBlockWords * sizeof *mine);
        } else if (cut[b] == 0 && rows == kBlockRows) {
            memset(mine, 0xff, kBlockWords * sizeof *mine);
            total += kBlockRows;
        } else {
            total += test_rows(in.spheres + row * 4, rows, planes, cut[b], mine);
        }
    }
    return total;
}

int32_t *write_ids(const uint64_t *hits, int64_t first_row, int32_t *out) {
    for (int w = 0; w < kBlockWords; ++w) {
        const int32_t base = (int32_t)first_row + 64 * w;
        uint64_t word = hits[w];
        if (word == ~(uint64_t)0) {
#pragma omp simd
            for (int i = 0; i < 64; ++i) out[i] = base + i;
            out += 64;
        } else {
            for (; word != 0; word &= word - 1) *out++ = base + __builtin_ctzll(word);
        }
    }
    return out;
}

}  // namespace

void update_all_blocks(const float *spheres, int64_t n_rows, float *blocks, int threads) {
    const int64_t n_blocks = blocks_of(n_rows);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < n_blocks; ++b) bound_block(spheres, n_rows, b, blocks);
}

bool update_blocks_of(const float *spheres, int64_t n_rows, const int32_t *ids, int64_t n_ids,
                      float *blocks, int threads) {
    int stray = 0;
#pragma omp parallel for schedule(dynamic, 4096) num_threads(threads) reduction(| : stray)
    for (int64_t i = 0; i < n_ids; ++i) {
        const int64_t id = ids[i];
        if (id < 0 || id >= n_rows)
            stray = 1;
        else if (i == 0 || id / kBlockRows != ids[i - 1] / kBlockRows)  // first id of its block
            bound_block(spheres, n_rows, id / kBlockRows, blocks);
    }
    return !stray;
}

int64_t cull(const Bounds &in, const float *planes, int n_planes, const CullScratch &scratch,
             int32_t *out, int64_t room, int threads) {
    const int64_t n_blocks = blocks_of(in.n_rows), n_groups = groups_of(n_blocks);
    int64_t *starts = scratch.starts;
    starts[0] = 0;
#pragma omp parallel num_threads(threads)
    {
// Dynamic, because a view's rows are neighbours in Morton order: most groups cost next to nothing.
#pragma omp for schedule(dynamic, 1)
        for (int64_t g = 0; g < n_groups; ++g) {
            const int64_t first = g * kGroupBlocks;
            starts[g + 1] = mark_group(in, planes, n_planes, first,
                                       (int)least(kGroupBlocks, n_blocks - first), scratch.hits);
        }
#pragma omp single
        for (int64_t g = 0; g < n_groups; ++g) starts[g + 1] += starts[g];
        if (starts[n_groups] <= room) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t g = 0; g < n_groups; ++g) {
                if (starts[g] == starts[g + 1]) continue;
                int32_t *to = out + starts[g];
                const int64_t end = least(n_blocks, (g + 1) * kGroupBlocks);
                for (int64_t b = g * kGroupBlocks; b < end; ++b)
                    to = write_ids(scratch.hits + b * kBlockWords, b * kBlockRows, to);
            }
        }
    }
    return starts[n_groups];
}

}  // namespace GSSCALE_ISA
}  // namespace gsscale
