#include "ids.h"

namespace gsscale {

// int, not bool: the compiler turns these loops into vector instructions.

bool ascending(const int32_t *ids, int64_t n) {
    const int threads = threads_for_ids(n / 4);
    int bad = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : bad)
    for (int64_t i = 1; i < n; ++i) bad |= ids[i - 1] >= ids[i];
    return !bad;
}

bool all_below(int64_t limit, const int32_t *ids, const int32_t *pick, int64_t n) {
    const int threads = threads_for_ids(n / 4);
    // Unsigned, negative ids are the largest ones.
    const uint32_t end = (uint32_t)std::min<int64_t>(limit, int64_t(1) << 31);
    int bad = 0;
    if (pick) {
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : bad)
        for (int64_t i = 0; i < n; ++i) bad |= (uint32_t)ids[pick[i]] >= end;
    } else {
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : bad)
        for (int64_t i = 0; i < n; ++i) bad |= (uint32_t)ids[i] >= end;
    }
    return !bad;
}

}  // namespace gsscale
