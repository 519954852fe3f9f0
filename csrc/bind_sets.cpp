// What two ascending lists of row ids have in common: the rows of a view that the next needs too.
#include <cstring>
#include <stdexcept>

#include "buffers.h"
#include "ids.h"

namespace gsscale {

namespace {

// Ids that are looked at together, marked in a byte each: 32 KB, what stays in the first cache.
// Merging would wait for every comparison before it could load the next id.
constexpr int64_t kWindow = 1 << 14;

struct Marks {
    uint8_t in_a[kWindow] = {}, in_b[kWindow] = {};
};

struct Span {
    const int32_t *ids;
    int64_t begin, end;
};

// Where the window that starts with the span, and ends below `limit`, ends.
int64_t window_end(const Span &s, int64_t limit) {
    const int64_t end = std::min(s.end, s.begin + kWindow);
    return std::lower_bound(s.ids + s.begin, s.ids + end, limit) - s.ids;
}

// Hands out windows: the parts of both spans whose ids lie in [base, base + kWindow).
template <class Visit>
void for_each_window(Span a, Span b, Visit visit) {
    while (a.begin < a.end || b.begin < b.end) {
        int64_t base = INT64_MAX;
        if (a.begin < a.end) base = a.ids[a.begin];
        if (b.begin < b.end) base = std::min<int64_t>(base, b.ids[b.begin]);
        const Span in_a{a.ids, a.begin, window_end(a, base + kWindow)};
        const Span in_b{b.ids, b.begin, window_end(b, base + kWindow)};
        visit(base, in_a, in_b);
        a.begin = in_a.end;
        b.begin = in_b.end;
    }
}

void mark(const Span &s, int64_t base, uint8_t *marks, uint8_t value) {
    for (int64_t i = s.begin; i < s.end; ++i) marks[s.ids[i] - base] = value;
}

int64_t count_common(Span a, Span b, Marks &marks) {
    int64_t common = 0;
    for_each_window(a, b, [&](int64_t base, const Span &in_a, const Span &in_b) {
        mark(in_b, base, marks.in_b, 1);
        for (int64_t i = in_a.begin; i < in_a.end; ++i) common += marks.in_b[in_a.ids[i] - base];
        mark(in_b, base, marks.in_b, 0);
    });
    return common;
}

// Appends positions: to `common` where the id is marked, to `only` elsewhere. The address is
// computed, since a branch would be guessed wrong where neighbouring ids differ.
void divide(const Span &s, int64_t base, const uint8_t *marks, int32_t *&common, int32_t *&only) {
    int32_t *yes = common, *no = only;
    for (int64_t i = s.begin; i < s.end; ++i) {
        const int64_t marked = marks[s.ids[i] - base];
        const uintptr_t mask = -(uintptr_t)marked;
        *(int32_t *)(((uintptr_t)yes & mask) | ((uintptr_t)no & ~mask)) = (int32_t)i;
        yes += marked;
        no += 1 - marked;
    }
    common = yes;
    only = no;
}

int64_t split_common(Ids a_, Ids b_, Ids common_a, Ids common_b, Ids only_a, Ids only_b) {
    const int64_t n = (int64_t)a_.shape(0), m = (int64_t)b_.shape(0), least = std::min(n, m);
    if ((int64_t)common_a.shape(0) < least || (int64_t)common_b.shape(0) < least ||
        (int64_t)only_a.shape(0) < n || (int64_t)only_b.shape(0) < m)
        throw std::invalid_argument(
            "outputs must have room: common for the shorter of a and b, only_a for a, only_b for b");
    const int32_t *a = a_.data(), *b = b_.data();
    nb::gil_scoped_release release;

    if (!ascending(a, n) || !ascending(b, m)) throw std::invalid_argument("ids must ascend");
    const int parts = threads_for_ids(std::max(n, m));
    // Cut the longer list into equal parts, the other one at the same ids.
    std::vector<int64_t> cut_a(parts + 1), cut_b(parts + 1), starts(parts + 1, 0);
    for (int part = 0; part <= parts; ++part) {
        const bool last = part == parts;
        if (n >= m) {
            cut_a[part] = part_start(n, part, parts);
            cut_b[part] = last ? m : part ? std::lower_bound(b, b + m, a[cut_a[part]]) - b : 0;
        } else {
            cut_b[part] = part_start(m, part, parts);
            cut_a[part] = last ? n : part ? std::lower_bound(a, a + n, b[cut_b[part]]) - a : 0;
        }
    }
    const auto span_a = [&](int part) { return Span{a, cut_a[part], cut_a[part + 1]}; };
    const auto span_b = [&](int part) { return Span{b, cut_b[part], cut_b[part + 1]}; };
    if (parts > 1) {
#pragma omp parallel for num_threads(parts) schedule(static, 1)
        for (int part = 0; part < parts; ++part) {
            Marks marks;
            starts[part + 1] = count_common(span_a(part), span_b(part), marks);
        }
        counts_to_starts(starts);
    }
    int64_t total = 0;
#pragma omp parallel for num_threads(parts) schedule(static, 1) reduction(+ : total)
    for (int part = 0; part < parts; ++part) {
        Marks marks;
        int32_t *first = common_a.data() + starts[part];
        int32_t *to_a = first, *to_b = common_b.data() + starts[part];
        int32_t *rest_a = only_a.data() + (cut_a[part] - starts[part]);
        int32_t *rest_b = only_b.data() + (cut_b[part] - starts[part]);
        for_each_window(span_a(part), span_b(part),
                        [&](int64_t base, const Span &in_a, const Span &in_b) {
                            mark(in_a, base, marks.in_a, 1);
                            mark(in_b, base, marks.in_b, 1);
                            divide(in_a, base, marks.in_b, to_a, rest_a);
                            divide(in_b, base, marks.in_a, to_b, rest_b);
                            mark(in_a, base, marks.in_a, 0);
                            mark(in_b, base, marks.in_b, 0);
                        });
        total += to_a - first;
    }
    return total;
}

}  // namespace

void bind_sets(nb::module_ &m) {
    m.def("split_common", &split_common, nb::arg("a").noconvert(), nb::arg("b").noconvert(),
          nb::arg("common_a").noconvert(), nb::arg("common_b").noconvert(),
          nb::arg("only_a").noconvert(), nb::arg("only_b").noconvert(),
          "Positions in the ascending ids `a` and `b`: common_a[k] and common_b[k] hold the same "
          "id, only_a and only_b are the others; all ascending. Returns the number in common.");
}

}  // namespace gsscale
