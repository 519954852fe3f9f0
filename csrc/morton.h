// Rows in the order of a Morton curve.
#pragma once

#include <cstdint>

namespace gsscale {

// Three coordinates of `n` rows, `width` floats apart; the curve is cut into 2^21 cells along each
// axis, from lo to hi, and what is outside is clamped.
struct Points {
    const float *first;
    int64_t width, n;
    const float *lo, *hi;
};

// order[i] is the row that belongs at i; of rows with one code the lower comes first. Beside `order`
// it takes some megabytes for each thread, if not most rows are at one place.
void morton_order(const Points &points, int32_t *order);

}  // namespace gsscale
