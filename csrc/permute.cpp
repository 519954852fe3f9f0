#include "permute.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace gsscale {

// Every kCut-th row is saved first and cuts the permutation's cycles into chains that threads follow
// independently.
constexpr int64_t kCut = 4096;

void permute_in_place(void *rows, int64_t bytes, const int32_t *from, int64_t n) {
    std::vector<uint8_t> written(n, 0);
    for (int64_t i = 0; i < n; ++i) {
        if (from[i] < 0 || from[i] >= n || written[from[i]])
            throw std::invalid_argument("order is not a permutation");
        written[from[i]] = 1;
    }
    std::fill(written.begin(), written.end(), 0);
    char *data = (char *)rows;

    const int64_t cuts = (n + kCut - 1) / kCut;
    std::vector<char> saved(cuts * bytes);
    for (int64_t c = 0; c < cuts; ++c)
        std::memcpy(&saved[c * bytes], data + c * kCut * bytes, bytes);
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t c = 0; c < cuts; ++c) {
        int64_t to = c * kCut;
        while (true) {
            const int64_t source = from[to];
            written[to] = 1;
            if (source % kCut == 0) {
                // The chain ends at a cut row: another thread may have overwritten it already.
                std::memcpy(data + to * bytes, &saved[source / kCut * bytes], bytes);
                break;
            }
            std::memcpy(data + to * bytes, data + source * bytes, bytes);
            to = source;
        }
    }
    // What is left are cycles without a cut row: short ones, in the main.
    std::vector<char> first(bytes);
    for (int64_t i = 0; i < n; ++i) {
        if (written[i] || from[i] == i) continue;
        std::memcpy(first.data(), data + i * bytes, bytes);
        int64_t to = i;
        while (from[to] != i) {
            std::memcpy(data + to * bytes, data + int64_t(from[to]) * bytes, bytes);
            written[to] = 1;
            to = from[to];
        }
        std::memcpy(data + to * bytes, first.data(), bytes);
        written[to] = 1;
    }
}

}  // namespace gsscale
