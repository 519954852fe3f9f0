// A sample of the codes gives splitters, which cut the curve into pieces of some ten thousand rows.
// Ids are gathered piece by piece; then each thread sorts a piece at a time, beside its codes. So no
// more than a few pieces' codes are in memory, and threads need not wait for each other.
#include "morton.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "ids.h"

namespace gsscale {

namespace {

constexpr int64_t kCells = int64_t(1) << 21;  // per axis: 3 x 21 bits make a 63-bit code
constexpr int64_t kPieceRows = 1 << 15, kMostPieces = 1 << 12, kSamplesPerPiece = 32;

// Moves bit i of a 21-bit number to bit 3 i.
int64_t spread_bits(int64_t x) {
    x = (x | x << 32) & 0x1f00000000ffff;
    x = (x | x << 16) & 0x1f0000ff0000ff;
    x = (x | x << 8) & 0x100f00f00f00f00f;
    x = (x | x << 4) & 0x10c30c30c30c30c3;
    x = (x | x << 2) & 0x1249249249249249;
    return x;
}

int64_t code_of(const Points &points, int64_t row) {
    const float *point = points.first + row * points.width;
    int64_t code = 0;
    for (int axis = 0; axis < 3; ++axis) {
        const float extent = points.hi[axis] - points.lo[axis];
        const float x = (point[axis] - points.lo[axis]) / (extent > 0.0f ? extent : 1.0f);
        const int64_t cell = x > 0.0f ? (x < 1.0f ? (int64_t)(x * kCells) : kCells - 1) : 0;
        code |= spread_bits(cell) << axis;
    }
    return code;
}

// The first code of each piece but the first one.
std::vector<int64_t> splitters_of(const Points &points, int64_t pieces) {
    const int64_t samples = std::min(points.n, pieces * kSamplesPerPiece);
    std::vector<int64_t> codes(samples), splitters(pieces - 1);
    for (int64_t k = 0; k < samples; ++k) codes[k] = code_of(points, points.n * k / samples);
    std::sort(codes.begin(), codes.end());
    for (int64_t p = 1; p < pieces; ++p) splitters[p - 1] = codes[samples * p / pieces];
    return splitters;
}

}  // namespace

void morton_order(const Points &points, int32_t *order) {
    const int64_t n = points.n;
    const int64_t pieces = std::clamp<int64_t>(n / kPieceRows, 1, kMostPieces);
    const std::vector<int64_t> splitters = splitters_of(points, pieces);
    const auto piece_of = [&](int64_t row) {
        return std::upper_bound(splitters.begin(), splitters.end(), code_of(points, row)) -
               splitters.begin();
    };
    // starts[piece * parts + part]: where the part's rows of that piece go, ascending.
    const int parts = threads_for_ids(n);
    std::vector<int64_t> starts(pieces * parts + 1, 0);
#pragma omp parallel for num_threads(parts) schedule(static, 1)
    for (int part = 0; part < parts; ++part) {
        std::vector<int64_t> count(pieces, 0);
        for (int64_t i = part_start(n, part, parts); i < part_start(n, part + 1, parts); ++i)
            ++count[piece_of(i)];
        for (int64_t p = 0; p < pieces; ++p) starts[p * parts + part + 1] = count[p];
    }
    counts_to_starts(starts);
#pragma omp parallel for num_threads(parts) schedule(static, 1)
    for (int part = 0; part < parts; ++part) {
        std::vector<int64_t> next(pieces);
        for (int64_t p = 0; p < pieces; ++p) next[p] = starts[p * parts + part];
        for (int64_t i = part_start(n, part, parts); i < part_start(n, part + 1, parts); ++i)
            order[next[piece_of(i)]++] = (int32_t)i;
    }
#pragma omp parallel num_threads(parts)
    {
        std::vector<std::pair<int64_t, int32_t>> rows;
#pragma omp for schedule(dynamic, 1)
        for (int64_t p = 0; p < pieces; ++p) {
            const int64_t begin = starts[p * parts], end = starts[(p + 1) * parts];
            rows.clear();
            rows.reserve(end - begin);
            for (int64_t i = begin; i < end; ++i)
                rows.push_back({code_of(points, order[i]), order[i]});
            std::sort(rows.begin(), rows.end());
            for (int64_t i = begin; i < end; ++i) order[i] = rows[i - begin].second;
        }
    }
}

}  // namespace gsscale
