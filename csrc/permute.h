// An in-place, multi-threaded permutation of rows.
#pragma once

#include <cstdint>

namespace gsscale {

// data[i] <- data[order[i]], for `n` rows of `bytes` bytes; extra memory n / 4096 rows + n bytes.
// Throws std::invalid_argument, and changes nothing, if `order` is not a permutation.
void permute_in_place(void *data, int64_t bytes, const int32_t *order, int64_t n);

}  // namespace gsscale
