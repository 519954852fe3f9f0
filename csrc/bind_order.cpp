// Where rows are: in Morton order, moved, written.
#include <cstring>
#include <optional>
#include <stdexcept>

#include <nanobind/stl/optional.h>

#include "buffers.h"
#include "morton.h"
#include "permute.h"

namespace gsscale {

namespace {

using LongIds = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Box = nb::ndarray<float, nb::shape<2, 3>, nb::c_contig, nb::device::cpu>;

void order_rows(Floats2 rows, int64_t column, Box box, Ids order) {
    const int64_t n = (int64_t)order.shape(0), width = (int64_t)rows.shape(1);
    if (n > (int64_t)rows.shape(0) || column < 0 || column + 3 > width)
        throw std::invalid_argument("morton_order: rows or column too small");
    const Points points{rows.data() + column, width, n, box.data(), box.data() + 3};
    nb::gil_scoped_release release;
    morton_order(points, order.data());
}

bool all_inside(const int64_t *ids, int64_t n, int64_t capacity) {
    bool inside = true;
    for (int64_t i = 0; i < n; ++i) inside &= ids[i] >= 0 && ids[i] < capacity;
    return inside;
}

// rows[target[i]] <- rows[source[i]], a few gigabytes a second and thread: numpy and torch do this
// on one thread, through a copy.
void copy_rows(Floats2 rows, LongIds source, LongIds target) {
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
void fill_rows(Floats2 rows, LongIds target, std::optional<Floats2> values) {
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

void permute_rows(Floats2 rows, Ids order) {
    const int64_t n = (int64_t)order.shape(0);
    if (n > (int64_t)rows.shape(0)) throw std::invalid_argument("permute_rows: more ids than rows");
    nb::gil_scoped_release release;
    permute_in_place(rows.data(), rows.shape(1) * sizeof(float), order.data(), n);
}

}  // namespace

void bind_order(nb::module_ &m) {
    m.def("morton_order", &order_rows, nb::arg("rows").noconvert(), nb::arg("column"),
          nb::arg("box").noconvert(), nb::arg("order").noconvert(),
          "order[i] <- which of the first len(order) rows belongs at i along a Morton curve of three "
          "float columns, inside box [2, 3]; of rows in one cell the lower comes first.");
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
