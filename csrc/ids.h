// Checks of row ids, and cutting loops over them into one part per thread.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace gsscale {

// Work from which all threads pay, some 0.2 ms. All or one: OpenMP ends threads when a team is
// smaller than the last one and starts them again for the next larger one.
constexpr int64_t kIdsForThreads = 1 << 17;

inline int threads_for_ids(int64_t n) { return n < kIdsForThreads ? 1 : omp_get_max_threads(); }

// Where part `part` of `parts` starts; part `parts` starts at n.
inline int64_t part_start(int64_t n, int part, int parts) { return n * part / parts; }

// counts[i + 1], what part i has, become starts[i], where it goes; the last entry is the sum.
inline void counts_to_starts(std::vector<int64_t> &counts) {
    for (size_t i = 1; i < counts.size(); ++i) counts[i] += counts[i - 1];
}

// Is every id above the one in front of it?
bool ascending(const int32_t *ids, int64_t n);

// Are ids[0 .. n - 1], or ids[pick[0 .. n - 1]], all between 0 and limit - 1?
bool all_below(int64_t limit, const int32_t *ids, const int32_t *pick, int64_t n);

}  // namespace gsscale
