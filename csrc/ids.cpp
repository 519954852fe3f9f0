#include "ids.h"

namespace gsscale {

bool ascending(const int32_t *ids, int64_t n) {
    const int parts = threads_for_ids(n / 4);
    bool good = true;
#pragma omp parallel for num_threads(parts) schedule(static) reduction(& : good)
    for (int64_t i = 1; i < n; ++i) good &= ids[i - 1] < ids[i];
    return good;
}

bool all_below(int64_t limit, const int32_t *ids, const int32_t *pick, int64_t n) {
    const int parts = threads_for_ids(n / 4);
    // Unsigned, negative ids are the largest ones.
    const uint32_t end = (uint32_t)std::min<int64_t>(limit, int64_t(1) << 31);
    bool good = true;
    if (pick) {
#pragma omp parallel for num_threads(parts) schedule(static) reduction(& : good)
        for (int64_t i = 0; i < n; ++i) good &= (uint32_t)ids[pick[i]] < end;
    } else {
#pragma omp parallel for num_threads(parts) schedule(static) reduction(& : good)
        for (int64_t i = 0; i < n; ++i) good &= (uint32_t)ids[i] < end;
    }
    return good;
}

}  // namespace gsscale
