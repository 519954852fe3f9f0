// Which row of the host store is in which slot of a cache in GPU memory: exact LRU by view.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>

#include <cstdlib>
#include <deque>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "buffers.h"
#include "ids.h"

namespace gsscale {

namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

// Rows that the lists may name per slot before those that no longer count are dropped.
constexpr int64_t kListedPerSlot = 4;

// Ids ahead whose entries are requested: the hardware stops at the gaps between ids.
constexpr int64_t kAhead = 32;

void require(bool condition, const char *message) {
    if (!condition) throw std::invalid_argument(message);
}

// Per row, not per slot: rows come in ascending order, so a pass over them runs through memory.
struct Residence {
    int32_t slot_plus_1;  // 0: not resident; zeroed pages are a table of absent rows
    int32_t view;         // that used the row last; -1 once the row has left
};

// The rows that a view used, ascending. A row counts in the list of the view that used it last; in
// older ones it is passed over.
struct ViewRows {
    int32_t view;
    size_t next;  // rows before this one have left, or been passed over
    std::vector<int32_t> rows;
};

class SlotTable {
  public:
    SlotTable(int64_t n_slots, int64_t n_rows) : n_slots_(n_slots) {
        require(0 <= n_slots && n_slots <= kMost, "n_slots must be between 0 and 2^31 - 1");
        clear(n_rows);
    }

    int64_t n_slots() const { return n_slots_; }
    int64_t n_rows() const { return n_rows_; }
    int64_t in_use() const { return in_use_; }
    int64_t listed() const { return listed_; }

    void clear(std::optional<int64_t> n_rows) {
        const int64_t n = n_rows.value_or(n_rows_);
        require(0 <= n && n <= kMost, "n_rows must be between 0 and 2^31 - 1");
        // calloc, because it takes no memory for rows that no view comes near.
        Residence *fresh = (Residence *)std::calloc(std::max<int64_t>(n, 1), sizeof(Residence));
        if (!fresh) throw std::bad_alloc();
        table_.reset(fresh);
        n_rows_ = n;
        in_use_ = listed_ = 0;
        views_.clear();
    }

    std::optional<std::pair<int64_t, int64_t>> plan(Ids ids_, int64_t view, int64_t protect_from,
                                                    Ids slots_, Ids rows_in_, Ids slots_in_,
                                                    Ids rows_out_) {
        const int64_t n = (int64_t)ids_.shape(0);
        for (const Ids *out : {&slots_, &rows_in_, &slots_in_, &rows_out_})
            require((int64_t)out->shape(0) >= n, "outputs must have room for one entry per id");
        require(last_view_ < view && view <= kMost,
                "view numbers must grow from call to call, and stay below 2^31");
        const int32_t *ids = ids_.data();
        int32_t *slots = slots_.data(), *rows_in = rows_in_.data();
        int32_t *slots_in = slots_in_.data(), *rows_out = rows_out_.data();
        nb::gil_scoped_release release;

        check_ids(ids, n);
        if (!fits(ids, n, protect_from)) return std::nullopt;
        if ((int64_t)places_.size() < n) places_.resize(n);
        if (n > 0) views_.push_back({(int32_t)view, 0, std::vector<int32_t>(ids, ids + n)});
        // From here on nothing can fail.
        listed_ += n;
        last_view_ = view;
        const int64_t misses = use(ids, n, (int32_t)view, slots, rows_in);
        const int64_t newest = choose_slots(misses, slots_in, rows_out);
        Residence *table = table_.get();
        const int32_t *places = places_.data();
        const int threads = threads_for_ids(misses);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t k = 0; k < misses; ++k) {
            slots[places[k]] = slots_in[k];
            table[rows_in[k]].slot_plus_1 = slots_in[k] + 1;
        }
        if (listed_ > kListedPerSlot * n_slots_) drop_passed_over();
        return std::make_pair(misses, newest);
    }

    int64_t lookup(Ids ids, Ids slots) const {
        const int64_t n = (int64_t)ids.shape(0);
        require((int64_t)slots.shape(0) >= n, "slots must have room for one entry per id");
        const int32_t *id = ids.data();
        int32_t *slot = slots.data();
        nb::gil_scoped_release release;
        check_ids(id, n);
        const Residence *table = table_.get();
        const int threads = threads_for_ids(n);
        int64_t found = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : found)
        for (int64_t i = 0; i < n; ++i) {
            if (i + kAhead < n) __builtin_prefetch(table + id[i + kAhead]);
            slot[i] = table[id[i]].slot_plus_1 - 1;
            found += slot[i] >= 0;
        }
        return found;
    }

    int64_t residents(Ids rows_, Ids slots_) const {
        require((int64_t)rows_.shape(0) >= in_use_ && (int64_t)slots_.shape(0) >= in_use_,
                "outputs must have room for all rows in use");
        int32_t *rows = rows_.data(), *slots = slots_.data();
        const Residence *table = table_.get();
        const int64_t n = in_use_ > 0 ? n_rows_ : 0;
        nb::gil_scoped_release release;
        const int parts = threads_for_ids(n);
        std::vector<int64_t> starts(parts + 1, 0);
#pragma omp parallel for num_threads(parts) schedule(static, 1)
        for (int part = 0; part < parts; ++part) {
            const int64_t end = part_start(n, part + 1, parts);
            int64_t count = 0;
            for (int64_t row = part_start(n, part, parts); row < end; ++row)
                count += table[row].slot_plus_1 > 0;
            starts[part + 1] = count;
        }
        counts_to_starts(starts);
#pragma omp parallel for num_threads(parts) schedule(static, 1)
        for (int part = 0; part < parts; ++part) {
            const int64_t end = part_start(n, part + 1, parts);
            int64_t k = starts[part];
            for (int64_t row = part_start(n, part, parts); row < end; ++row) {
                if (table[row].slot_plus_1 == 0) continue;
                rows[k] = (int32_t)row;
                slots[k++] = table[row].slot_plus_1 - 1;
            }
        }
        return starts.back();
    }

  private:
    struct Free {
        void operator()(Residence *table) const { std::free(table); }
    };

    int64_t n_slots_, n_rows_ = 0, in_use_ = 0, last_view_ = -1;
    int64_t listed_ = 0;  // rows still to come in views_
    std::unique_ptr<Residence[], Free> table_;
    std::deque<ViewRows> views_;  // oldest first
    std::vector<int32_t> places_; // of the misses of the present call, in its ids

    void check_ids(const int32_t *ids, int64_t n) const {
        if (n == 0) return;
        require(ascending(ids, n), "ids must ascend");
        require(ids[0] >= 0 && ids[n - 1] < n_rows_, "row id outside of 0 .. n_rows - 1");
    }

    // Notes that `view` uses these rows, so that none of them can leave any more. Finds their slots,
    // -1 for a miss; writes the misses to rows_in and where they are in ids to places_.
    int64_t use(const int32_t *ids, int64_t n, int32_t view, int32_t *slots, int32_t *rows_in) {
        Residence *table = table_.get();
        int32_t *places = places_.data();
        const int parts = threads_for_ids(n);
        std::vector<int64_t> found(parts);
#pragma omp parallel for num_threads(parts) schedule(static, 1)
        for (int part = 0; part < parts; ++part) {
            const int64_t begin = part_start(n, part, parts), end = part_start(n, part + 1, parts);
            int64_t k = begin;
            for (int64_t i = begin; i < end; ++i) {
                if (i + kAhead < end) __builtin_prefetch(table + ids[i + kAhead], 1);
                Residence &row = table[ids[i]];
                row.view = view;
                slots[i] = row.slot_plus_1 - 1;
                // Written in any case, which costs less than a branch that is guessed wrong.
                rows_in[k] = ids[i];
                places[k] = (int32_t)i;
                k += row.slot_plus_1 == 0;
            }
            found[part] = k - begin;
        }
        // Close the gaps between the parts.
        int64_t misses = found[0];
        for (int part = 1; part < parts; ++part) {
            const int64_t begin = part_start(n, part, parts);
            std::copy_n(rows_in + begin, found[part], rows_in + misses);
            std::copy_n(places + begin, found[part], places + misses);
            misses += found[part];
        }
        return misses;
    }

    // Is there a slot for each of `ids` beside the protected rows that are not among them?
    bool fits(const int32_t *ids, int64_t n, int64_t protect_from) const {
        int64_t room = n_slots_ - n, listed = 0;
        if (room < 0) return false;
        if (in_use_ <= room) return true;
        for (auto list = views_.rbegin(); list != views_.rend() && list->view >= protect_from; ++list)
            listed += (int64_t)list->rows.size();
        if (listed <= room) return true;
        // Close: count those that still count, and are not among `ids`.
        const Residence *table = table_.get();
        for (auto list = views_.rbegin(); list != views_.rend() && list->view >= protect_from; ++list) {
            const int32_t *rows = list->rows.data(), view = list->view;
            const int64_t size = (int64_t)list->rows.size();
            const int parts = threads_for_ids(size);
            int64_t kept = 0;
#pragma omp parallel for num_threads(parts) schedule(static, 1) reduction(+ : kept)
            for (int part = 0; part < parts; ++part) {
                const int64_t begin = part_start(size, part, parts);
                const int64_t end = part_start(size, part + 1, parts);
                const int32_t *id = begin < end ? std::lower_bound(ids, ids + n, rows[begin]) : ids;
                for (int64_t i = begin; i < end; ++i) {
                    if (table[rows[i]].view != view) continue;
                    while (id != ids + n && *id < rows[i]) ++id;
                    kept += id == ids + n || *id != rows[i];
                }
            }
            room -= kept;
            if (room < 0) return false;
        }
        return true;
    }

    // A slot for each miss: empty ones first, then those of the rows that were used longest ago,
    // which leave. Returns the newest view that used any of these, or -1.
    int64_t choose_slots(int64_t misses, int32_t *slots_in, int32_t *rows_out) {
        const int64_t fresh = std::min(misses, n_slots_ - in_use_);
        for (int64_t k = 0; k < fresh; ++k) {
            slots_in[k] = (int32_t)(in_use_ + k);
            rows_out[k] = -1;
        }
        in_use_ += fresh;
        Residence *table = table_.get();
        int64_t k = fresh, newest = -1;
        while (k < misses) {
            ViewRows &oldest = views_.front();
            const int32_t *rows = oldest.rows.data();
            const int32_t view = oldest.view;
            const size_t size = oldest.rows.size(), begin = oldest.next;
            size_t next = begin;
            const int64_t before = k;
            for (; next < size && k < misses; ++next) {
                if (next + kAhead < size) __builtin_prefetch(table + rows[next + kAhead], 1);
                Residence &row = table[rows[next]];
                if (row.view != view) continue;
                rows_out[k] = rows[next];
                slots_in[k++] = row.slot_plus_1 - 1;
                row = {0, -1};
            }
            if (k > before) newest = view;
            listed_ -= (int64_t)(next - begin);
            oldest.next = next;
            if (next == size) views_.pop_front();
        }
        return newest;
    }

    // Each resident row counts in one list only, so that what is left is one row per slot in use.
    void drop_passed_over() {
        const Residence *table = table_.get();
        const int64_t n = (int64_t)views_.size();
        const int threads = threads_for_ids(listed_);
        int64_t kept = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(+ : kept)
        for (int64_t i = 0; i < n; ++i) {
            ViewRows &list = views_[i];
            int32_t *rows = list.rows.data();
            size_t to = 0;
            for (size_t from = list.next; from < list.rows.size(); ++from) {
                rows[to] = rows[from];
                to += table[rows[from]].view == list.view;
            }
            list.rows.resize(to);
            list.rows.shrink_to_fit();
            list.next = 0;
            kept += (int64_t)to;
        }
        listed_ = kept;
        views_.erase(std::remove_if(views_.begin(), views_.end(),
                                    [](const ViewRows &list) { return list.rows.empty(); }),
                     views_.end());
    }
};

}  // namespace

void bind_slots(nb::module_ &m) {
    nb::class_<SlotTable>(m, "SlotTable",
                          "Which rows are in the slots of a cache, and which leave it first: exact "
                          "LRU by view. Calls must come from one thread at a time.")
        .def(nb::init<int64_t, int64_t>(), nb::arg("n_slots"), nb::arg("n_rows"))
        .def_prop_ro("n_slots", &SlotTable::n_slots)
        .def_prop_ro("n_rows", &SlotTable::n_rows)
        .def_prop_ro("in_use", &SlotTable::in_use, "Slots that hold a row.")
        .def_prop_ro("listed", &SlotTable::listed,
                     "Rows in the lists that order the slots by age: at most 4 per slot.")
        .def("plan", &SlotTable::plan, nb::arg("ids").noconvert(), nb::arg("view"),
             nb::arg("protect_from"), nb::arg("slots").noconvert(), nb::arg("rows_in").noconvert(),
             nb::arg("slots_in").noconvert(), nb::arg("rows_out").noconvert(),
             "Give each row of `ids` (ascending) a slot, slots[i], for view number `view`, higher "
             "than any before. For the k-th row that was not resident, in ascending order: "
             "rows_in[k] is the row, slots_in[k] its slot, rows_out[k] the row that leaves it, or "
             "-1 where it was empty. Rows used longest ago leave first, of one view's in ascending "
             "order; rows of `ids` or used by a view >= protect_from stay. Returns the number of "
             "rows that were not resident and the newest view that used any of those that leave, "
             "or -1; or None, and changes nothing, if the rows do not fit.")
        .def("lookup", &SlotTable::lookup, nb::arg("ids").noconvert(), nb::arg("slots").noconvert(),
             "Slots of the rows `ids` (ascending), -1 where not resident; returns the number of "
             "those that are. This is not a use.")
        .def("residents", &SlotTable::residents, nb::arg("rows").noconvert(),
             nb::arg("slots").noconvert(),
             "All resident rows, ascending, and their slots; returns how many they are.")
        .def("clear", &SlotTable::clear, nb::arg("n_rows").none() = nb::none(),
             "Empty all slots; optionally, set a new number of rows.");
}

}  // namespace gsscale
