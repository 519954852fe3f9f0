// Row order: Morton codes and an in-place, multi-threaded permutation of rows.
#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <vector>

#include <nanobind/stl/optional.h>

#include "buffers.h"

namespace gsscale {

namespace {

using Codes = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Box = nb::ndarray<float, nb::shape<2, 3>, nb::c_contig, nb::device::cpu>;

constexpr int64_t kCells = int64_t(1) << 21;  // per axis: 3 x 21 bits make a 63-bit code

// Moves bit i of a 21-bit number to bit 3 i.
int64_t spread_bits(int64_t x) {
    x = (x | x << 32) & 0x1f00000000ffff;
    x = (x | x << 16) & 0x1f0000ff0000ff;
    x = (x | x << 8) & 0x100f00f00f00f00f;
    x = (x | x << 4) & 0x10c30c30c30c30c3;
    x = (x | x << 2) & 0x1249249249249249;
    return x;
}

void morton_codes(Floats2 rows, int64_t column, int64_t n, Box box, Codes out) {
    if (n > (int64_t)rows.shape(0) || n > (int64_t)out.shape(0) || column < 0 ||
        column + 3 > (int64_t)rows.shape(1))
        throw std::invalid_argument("morton_codes: rows, column or out too small");
    const int64_t width = rows.shape(1);
    const float *means = rows.data() + column;
    const float *lo = box.data(), *hi = box.data() + 3;
    int64_t *codes = out.data();
    nb::gil_scoped_release release;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
        int64_t code = 0;
        for (int axis = 0; axis < 3; ++axis) {
            const float extent = hi[axis] - lo[axis];
            const float x = (means[i * width + axis] - lo[axis]) / (extent > 0.0f ? extent : 1.0f);
            int64_t cell = x > 0.0f ? (x < 1.0f ? (int64_t)(x * kCells) : kCells - 1) : 0;
            code |= spread_bits(cell) << axis;
        }
        codes[i] = code;
    }
}

bool all_inside(const int64_t *ids, int64_t n, int64_t capacity) {
    bool inside = true;
    for (int64_t i = 0; i < n; ++i) inside &= ids[i] >= 0 && ids[i] < capacity;
    return inside;
}

// rows[target[i]] <- rows[source[i]], a few gigabytes a second and thread: numpy and torch do this
// on one thread, through a copy.
void copy_rows(Floats2 rows, Codes source, Codes target) {
    const int64_t n = (int64_t)source.shape(0), width = (int64_t)rows.shape(1);
    if ((int64_t)target.shape(0) != n)
        throw std::invalid_argument("copy_rows: as many targets as sources are needed");
    const int64_t *from = source.data(), *to = target.data(), capacity = (int64_t)rows.shape(0);
    float *data = rows.data();
    nb::gil_scoped_release release;
    if (!all_inside(from, n, capacity) || !all_inside(to, n, capacity))
        throw std::invalid_argument("copy_rows: row outside of the store");
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i)
        std::memcpy(data + to[i] * width, data + from[i] * width, width * sizeof(float));
}

// rows[target[i]] <- values[i], or zeros.
void fill_rows(Floats2 rows, Codes target, std::optional<Floats2> values) {
    const int64_t n = (int64_t)target.shape(0), width = (int64_t)rows.shape(1);
    if (values && ((int64_t)values->shape(0) < n || (int64_t)values->shape(1) != width))
        throw std::invalid_argument("fill_rows: values must have a row for each target");
    const int64_t *to = target.data(), capacity = (int64_t)rows.shape(0);
    const float *from = values ? values->data() : nullptr;
    float *data = rows.data();
    nb::gil_scoped_release release;
    if (!all_inside(to, n, capacity))
        throw std::invalid_argument("fill_rows: row outside of the store");
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; ++i) {
        if (from)
            std::memcpy(data + to[i] * width, from + i * width, width * sizeof(float));
        else
            std::memset(data + to[i] * width, 0, width * sizeof(float));
    }
}

// rows[i] <- rows[order[i]], in place. Every kCut-th row is saved first and cuts the permutation's
// cycles into chains that threads follow independently; extra memory is n / kCut rows + n bytes.
constexpr int64_t kCut = 4096;

void permute_rows(Floats2 rows, Ids order) {
    const int64_t n = (int64_t)order.shape(0), width = (int64_t)rows.shape(1);
    if (n > (int64_t)rows.shape(0)) throw std::invalid_argument("permute_rows: more ids than rows");
    const int32_t *from = order.data();
    std::vector<uint8_t> written(n, 0);
    for (int64_t i = 0; i < n; ++i) {
        if (from[i] < 0 || from[i] >= n || written[from[i]])
            throw std::invalid_argument("permute_rows: order is not a permutation");
        written[from[i]] = 1;
    }
    std::fill(written.begin(), written.end(), 0);
    float *data = rows.data();
    const size_t bytes = width * sizeof(float);
    nb::gil_scoped_release release;

    const int64_t cuts = (n + kCut - 1) / kCut;
    std::vector<float> saved(cuts * width);
    for (int64_t c = 0; c < cuts; ++c)
        std::memcpy(&saved[c * width], data + c * kCut * width, bytes);
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t c = 0; c < cuts; ++c) {
        int64_t to = c * kCut;
        while (true) {
            const int64_t source = from[to];
            written[to] = 1;
            if (source % kCut == 0) {
                // The chain ends at a cut row: another thread may have overwritten it already.
                std::memcpy(data + to * width, &saved[source / kCut * width], bytes);
                break;
            }
            std::memcpy(data + to * width, data + source * width, bytes);
            to = source;
        }
    }
    // What is left are cycles without a cut row: short ones, in the main.
    std::vector<float> first(width);
    for (int64_t i = 0; i < n; ++i) {
        if (written[i] || from[i] == i) continue;
        std::memcpy(first.data(), data + i * width, bytes);
        int64_t to = i;
        while (from[to] != i) {
            std::memcpy(data + to * width, data + int64_t(from[to]) * width, bytes);
            written[to] = 1;
            to = from[to];
        }
        std::memcpy(data + to * width, first.data(), bytes);
        written[to] = 1;
    }
}

}  // namespace

void bind_order(nb::module_ &m) {
    m.def("morton_codes", &morton_codes, nb::arg("rows").noconvert(), nb::arg("column"), nb::arg("n"),
          nb::arg("box").noconvert(), nb::arg("out").noconvert(),
          "63-bit Morton codes of three float columns of the first n rows, inside box [2, 3].");
    m.def("copy_rows", &copy_rows, nb::arg("rows").noconvert(), nb::arg("source").noconvert(),
          nb::arg("target").noconvert(),
          "rows[target[i]] <- rows[source[i]]; no row may be both a source and a target, or twice a "
          "target.");
    m.def("fill_rows", &fill_rows, nb::arg("rows").noconvert(), nb::arg("target").noconvert(),
          nb::arg("values").noconvert().none() = nb::none(),
          "rows[target[i]] <- values[i], or zeros; no row may be twice a target.");
    m.def("permute_rows", &permute_rows, nb::arg("rows").noconvert(), nb::arg("order").noconvert(),
          "rows[i] <- rows[order[i]] in place; extra memory n / 4096 rows + n bytes.");
}

}  // namespace gsscale
