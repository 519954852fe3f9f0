// Which row of the host store is in which slot of a cache in GPU memory, and which leaves first:
// the row that will be needed last, as far as the coming views are known (Belady's rule).
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>

#include <cstdlib>
#include <cstring>
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

using Moves = nb::ndarray<int32_t, nb::shape<-1, 3>, nb::c_contig, nb::device::cpu>;

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

// Views that can be told in advance; view v is bit v % 32 of a row's mask.
constexpr int64_t kAheadBits = 32, kMostAhead = 30;

// Rows leave in descending order of their bucket: 0 .. 31, the distance to the next view known to
// need the row; from 32 on, none is known: the number of views since the last one, up to 31.
constexpr int kBuckets = 64;
constexpr uint8_t kStays = 255;

// Rows whose residents are counted together. A view's rows are neighbours, so a scan for rows that
// can leave finds most blocks with none.
constexpr int64_t kBlock = 1024;

inline int64_t blocks_of(int64_t rows) { return (rows + kBlock - 1) / kBlock; }

// Ids ahead whose entries are requested: the hardware stops at the gaps between ids.
constexpr int64_t kAhead = 64;

void require(bool condition, const char *message) {
    if (!condition) throw std::invalid_argument(message);
}

// Per row, not per slot: rows come in ascending order, so a pass over them runs through memory.
struct Residence {
    int32_t slot_plus_1;  // 0: not resident; zeroed pages are a table of absent rows
    int32_t view;         // that used the row last; -1 once the row has left
};

// The rows that a view used, ascending.
struct ViewRows {
    int32_t view;
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

    void clear(std::optional<int64_t> n_rows) {
        const int64_t n = n_rows.value_or(n_rows_);
        require(0 <= n && n <= kMost, "n_rows must be between 0 and 2^31 - 1");
        // calloc, because it takes no memory for rows that no view comes near.
        Residence *fresh = (Residence *)std::calloc(std::max<int64_t>(n, 1), sizeof(Residence));
        uint32_t *masks = (uint32_t *)std::calloc(std::max<int64_t>(n, 1), sizeof(uint32_t));
        if (!fresh || !masks) {
            std::free(fresh);
            std::free(masks);
            throw std::bad_alloc();
        }
        table_.reset(fresh);
        ahead_.reset(masks);
        buckets_.reset();
        n_rows_ = n;
        residents_.assign(blocks_of(n), 0);
        in_use_ = handed_out_ = 0;
        free_.clear();
        views_.clear();
    }

    // -- rows that change; the next plan cannot protect rows of views before it ------------------

    void drop(Ids ids_) {
        const int64_t n = (int64_t)ids_.shape(0);
        const int32_t *ids = ids_.data();
        nb::gil_scoped_release release;
        check_ids(ids, n);
        end_protection();
        for (int64_t i = 0; i < n; ++i) {
            Residence &row = table_[ids[i]];
            if (row.slot_plus_1 > 0) {
                free_.push_back(row.slot_plus_1 - 1);
                --residents_[ids[i] / kBlock];
            }
            row = {0, -1};
        }
        in_use_ = handed_out_ - (int64_t)free_.size();
    }

    void rename(Ids from_, Ids to_) {
        const int64_t n = check_pairs(from_, to_);
        const int32_t *from = from_.data(), *to = to_.data();
        nb::gil_scoped_release release;
        end_protection();
        for (int64_t i = 0; i < n; ++i) {
            require(table_[to[i]].slot_plus_1 == 0, "the new id is that of a resident row");
            if (table_[from[i]].slot_plus_1 > 0) {
                --residents_[from[i] / kBlock];
                ++residents_[to[i] / kBlock];
            }
            table_[to[i]] = table_[from[i]];
            ahead_[to[i]] = ahead_[from[i]];
            table_[from[i]] = {0, -1};
            ahead_[from[i]] = 0;
        }
    }

    void expect_like(Ids from_, Ids to_) {
        const int64_t n = check_pairs(from_, to_);
        const int32_t *from = from_.data(), *to = to_.data();
        for (int64_t i = 0; i < n; ++i) ahead_[to[i]] = ahead_[from[i]];
    }

    void permute(Ids order_) {
        const int64_t n = (int64_t)order_.shape(0);
        const int32_t *order = order_.data();
        require(n == n_rows_ && all_below(n, order, nullptr, n), "order must be of all rows");
        nb::gil_scoped_release release;
        end_protection();
        std::unique_ptr<Residence[], Free> table((Residence *)std::malloc(n * sizeof(Residence)));
        std::unique_ptr<uint32_t[], Free> ahead((uint32_t *)std::malloc(n * sizeof(uint32_t)));
        if (n > 0 && (!table || !ahead)) throw std::bad_alloc();
        const int threads = threads_for_ids(n);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t i = 0; i < n; ++i) {
            table[i] = table_[order[i]];
            ahead[i] = ahead_[order[i]];
        }
        table_ = std::move(table);
        ahead_ = std::move(ahead);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t block = 0; block < blocks_of(n); ++block) {
            int32_t count = 0;
            for (int64_t row = block * kBlock; row < std::min(n, (block + 1) * kBlock); ++row)
                count += table_[row].slot_plus_1 > 0;
            residents_[block] = count;
        }
    }

    void resize(int64_t n_slots, int64_t n_rows) {
        require(n_slots_ <= n_slots && n_slots <= kMost, "slots can only be added");
        require(0 <= n_rows && n_rows <= kMost, "n_rows must be between 0 and 2^31 - 1");
        for (int64_t row = n_rows; row < n_rows_; ++row)
            require(table_[row].slot_plus_1 == 0, "a row that is to go is resident: drop it first");
        end_protection();
        resize_array(table_, n_rows_, n_rows);
        resize_array(ahead_, n_rows_, n_rows);
        buckets_.reset();
        residents_.resize(blocks_of(n_rows), 0);  // none in blocks that go
        n_slots_ = n_slots;
        n_rows_ = n_rows;
    }

    void expect(Ids ids_, int64_t view) {
        const int64_t n = (int64_t)ids_.shape(0);
        require(last_view_ < view && view <= last_view_ + kMostAhead,
                "a view can be expected at most 30 views ahead of the last one");
        const int32_t *ids = ids_.data();
        nb::gil_scoped_release release;
        check_ids(ids, n);
        uint32_t *masks = ahead_.get();
        const uint32_t bit = uint32_t(1) << (view % kAheadBits);
        const int threads = threads_for_ids(n);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t i = 0; i < n; ++i) {
            if (i + kAhead < n) __builtin_prefetch(masks + ids[i + kAhead], 1);
            masks[ids[i]] |= bit;
        }
    }

    std::optional<std::pair<int64_t, int64_t>> plan(Ids ids_, int64_t view, int64_t protect_from,
                                                    Ids slots_, Moves moves_) {
        const int64_t n = (int64_t)ids_.shape(0);
        require((int64_t)slots_.shape(0) >= n && (int64_t)moves_.shape(0) >= n,
                "slots and moves must have room for one entry per id");
        require(last_view_ < view && view <= kMost,
                "view numbers must grow from call to call, and stay below 2^31");
        require(protected_from_ <= protect_from, "protect_from must not go back");
        const int32_t *ids = ids_.data();
        int32_t *slots = slots_.data(), *moves = moves_.data();
        nb::gil_scoped_release release;

        check_ids(ids, n);
        if (!fits(ids, n, protect_from)) return std::nullopt;
        for (std::vector<int32_t> *list : {&places_, &rows_in_, &slots_in_, &rows_out_})
            if ((int64_t)list->size() < n) list->resize(n);
        while (!views_.empty() && views_.front().view < protect_from) views_.pop_front();
        if (n > 0) views_.push_back({(int32_t)view, std::vector<int32_t>(ids, ids + n)});
        // The rows fit, and so do the lists: from here on the table changes.
        last_view_ = view;
        protected_from_ = protect_from;
        const int64_t misses = use(ids, n, (int32_t)view, slots, rows_in_.data());
        const int64_t newest =
            choose_slots(misses, protect_from, slots_in_.data(), rows_out_.data());
        Residence *table = table_.get();
        const int threads = threads_for_ids(misses);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t k = 0; k < misses; ++k) {
            const int32_t in = rows_in_[k], slot = slots_in_[k], out = rows_out_[k];
            if (out >= 0) {
                table[out] = {0, -1};
#pragma omp atomic
                --residents_[out / kBlock];
            }
            slots[places_[k]] = slot;
            table[in].slot_plus_1 = slot + 1;
#pragma omp atomic
            ++residents_[in / kBlock];
            moves[3 * k] = in;
            moves[3 * k + 1] = slot;
            moves[3 * k + 2] = out;
        }
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
        void operator()(void *memory) const { std::free(memory); }
    };

    int64_t n_slots_, n_rows_ = 0, in_use_ = 0, last_view_ = -1;
    int64_t handed_out_ = 0;     // slots from here on have never held a row
    std::vector<int32_t> free_;  // slots below that hold none
    std::vector<int32_t> residents_;  // per kBlock rows
    int64_t protected_from_ = std::numeric_limits<int64_t>::min();
    std::unique_ptr<Residence[], Free> table_;
    std::unique_ptr<uint32_t[], Free> ahead_;     // per row: views that are expected to need it
    std::unique_ptr<uint8_t[], Free> buckets_;    // per row, while slots are chosen
    std::deque<ViewRows> views_;                  // protected, at the last call; oldest first
    // Of the misses of the present call: where they are in its ids, and what moves.
    std::vector<int32_t> places_, rows_in_, slots_in_, rows_out_;

    void check_ids(const int32_t *ids, int64_t n) const {
        if (n == 0) return;
        require(ascending(ids, n), "ids must ascend");
        require(ids[0] >= 0 && ids[n - 1] < n_rows_, "row id outside of 0 .. n_rows - 1");
    }

    // How many they are: each id of `from` has one of `to`, in any order.
    int64_t check_pairs(const Ids &from, const Ids &to) const {
        const int64_t n = (int64_t)from.shape(0);
        require((int64_t)to.shape(0) == n, "as many new ids as old ones are needed");
        require(all_below(n_rows_, from.data(), nullptr, n) &&
                    all_below(n_rows_, to.data(), nullptr, n),
                "row id outside of 0 .. n_rows - 1");
        return n;
    }

    // The lists of protected rows name rows by ids that are about to change.
    void end_protection() {
        views_.clear();
        protected_from_ = std::max(protected_from_, last_view_ + 1);
    }

    template <typename T>
    static void resize_array(std::unique_ptr<T[], Free> &array, int64_t before, int64_t after) {
        T *moved = (T *)std::realloc(array.get(), std::max<int64_t>(after, 1) * sizeof(T));
        if (!moved) throw std::bad_alloc();
        array.release();
        array.reset(moved);
        if (after > before) std::memset((void *)(moved + before), 0, (after - before) * sizeof(T));
    }

    // Notes that `view` uses these rows, so that none of them can leave any more. Finds their slots,
    // -1 for a miss; writes the misses to rows_in and where they are in ids to places_.
    int64_t use(const int32_t *ids, int64_t n, int32_t view, int32_t *slots, int32_t *rows_in) {
        Residence *table = table_.get();
        uint32_t *masks = ahead_.get();
        const uint32_t done = ~(uint32_t(1) << (view % kAheadBits));
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
                masks[ids[i]] &= done;
                slots[i] = row.slot_plus_1 - 1;
                // Written in any case: that costs less than a branch that is guessed wrong.
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

    // A slot for each miss: empty ones first, then those of the rows that leave, in ascending order
    // of the rows. Returns the newest view that used any of these, or -1.
    int64_t choose_slots(int64_t misses, int64_t protect_from, int32_t *slots_in,
                         int32_t *rows_out) {
        const int64_t fresh = std::min(misses, n_slots_ - in_use_), leaving = misses - fresh;
        for (int64_t k = 0; k < fresh; ++k) {
            slots_in[k] = free_.empty() ? (int32_t)handed_out_++ : free_.back();
            if (!free_.empty()) free_.pop_back();
            rows_out[k] = -1;
        }
        in_use_ += fresh;
        if (leaving == 0) return -1;
        slots_in += fresh;
        rows_out += fresh;

        if (!buckets_) {
            buckets_.reset((uint8_t *)std::malloc(n_rows_));
            if (!buckets_) throw std::bad_alloc();
        }
        uint8_t *buckets = buckets_.get();
        const Residence *table = table_.get();
        const int parts = threads_for_ids(n_rows_);
        std::vector<int64_t> counts((size_t)parts * kBuckets, 0);
#pragma omp parallel for num_threads(parts) schedule(static, 1)
        for (int part = 0; part < parts; ++part) {
            int64_t in_bucket[kBuckets] = {};
            for_each_resident_block(part, parts, [&](int64_t row, int64_t end) {
                for (; row < end; ++row) {
                    buckets[row] = bucket_of(row, protect_from);
                    if (buckets[row] != kStays) ++in_bucket[buckets[row]];
                }
            });
            std::copy_n(in_bucket, kBuckets, &counts[(size_t)part * kBuckets]);
        }

        // Everything above bucket `last` leaves, and so many of `last` as are still missing.
        const auto total = [&](int bucket) {
            int64_t sum = 0;
            for (int part = 0; part < parts; ++part) sum += counts[(size_t)part * kBuckets + bucket];
            return sum;
        };
        int last = kBuckets - 1;
        int64_t above = 0;
        for (int64_t here = total(last); above + here < leaving; here = total(last)) {
            above += here;
            --last;
        }
        std::vector<int64_t> starts(parts + 1, 0), quotas(parts);
        int64_t rest = leaving - above;
        for (int part = 0; part < parts; ++part) {
            const int64_t *count = &counts[(size_t)part * kBuckets];
            quotas[part] = std::min(rest, count[last]);
            rest -= quotas[part];
            starts[part + 1] = starts[part] + quotas[part];
            for (int bucket = last + 1; bucket < kBuckets; ++bucket)
                starts[part + 1] += count[bucket];
        }
        int32_t newest = -1;
#pragma omp parallel for num_threads(parts) schedule(static, 1) reduction(max : newest)
        for (int part = 0; part < parts; ++part) {
            int64_t k = starts[part], quota = quotas[part];
            for_each_resident_block(part, parts, [&](int64_t row, int64_t end) {
                for (; row < end; ++row) {
                    const int bucket = buckets[row];
                    if (bucket == kStays || bucket < last || (bucket == last && quota-- <= 0))
                        continue;
                    rows_out[k] = (int32_t)row;
                    slots_in[k++] = table[row].slot_plus_1 - 1;
                    newest = std::max(newest, table[row].view);
                }
            });
        }
        return newest;
    }

    // Calls `visit(begin, end)` for each run of rows of this thread's part that may be resident.
    template <typename Visit>
    void for_each_resident_block(int part, int parts, Visit visit) const {
        const int64_t end = part_start(blocks_of(n_rows_), part + 1, parts);
        for (int64_t block = part_start(blocks_of(n_rows_), part, parts); block < end; ++block)
            if (residents_[block] > 0)
                visit(block * kBlock, std::min(n_rows_, (block + 1) * kBlock));
    }

    uint8_t bucket_of(int64_t row, int64_t protect_from) {
        const Residence &residence = table_[row];
        if (residence.slot_plus_1 == 0 || residence.view >= protect_from ||
            residence.view == last_view_)
            return kStays;
        // Bit 0 is the next view. The last two bits are views that have been: a row that was
        // expected by one and not used after all.
        const int turn = (int)((last_view_ + 1) % kAheadBits);
        uint32_t mask = ahead_[row];
        mask = turn ? mask >> turn | mask << (kAheadBits - turn) : mask;
        mask &= (uint32_t(1) << kMostAhead) - 1;
        if (mask) return (uint8_t)__builtin_ctz(mask);
        return (uint8_t)(32 + std::min<int64_t>(31, last_view_ - residence.view));
    }
};

}  // namespace

void bind_slots(nb::module_ &m) {
    nb::class_<SlotTable>(m, "SlotTable",
                          "Which rows are in the slots of a cache, and which leave it first: those "
                          "that are needed last. Calls must come from one thread at a time.")
        .def(nb::init<int64_t, int64_t>(), nb::arg("n_slots"), nb::arg("n_rows"))
        .def_prop_ro("n_slots", &SlotTable::n_slots)
        .def_prop_ro("n_rows", &SlotTable::n_rows)
        .def_prop_ro("in_use", &SlotTable::in_use, "Slots that hold a row.")
        .def("expect", &SlotTable::expect, nb::arg("ids").noconvert(), nb::arg("view"),
             "Note that view number `view`, at most 30 after the last one, will need the rows "
             "`ids` (ascending). A row that it does not use after all counts as needed later on.")
        .def("plan", &SlotTable::plan, nb::arg("ids").noconvert(), nb::arg("view"),
             nb::arg("protect_from"), nb::arg("slots").noconvert(), nb::arg("moves").noconvert(),
             "Give each row of `ids` (ascending) a slot, slots[i], for view number `view`, higher "
             "than any before. moves[k] = (row, slot, row that leaves it) tells of the k-th row "
             "that was not resident, in ascending order of the rows; the row that leaves is "
             "-1 where it was empty. Rows that no view is known to need leave first, those used "
             "longest ago before others; then those needed last. Of equals the lower row leaves. "
             "Rows of `ids` or used by a view >= protect_from, which never goes back, stay. Returns the number of rows "
             "that were not resident and the newest view that used any of those that leave, or -1; "
             "or None, and changes nothing, if the rows do not fit.")
        .def("lookup", &SlotTable::lookup, nb::arg("ids").noconvert(), nb::arg("slots").noconvert(),
             "Slots of the rows `ids` (ascending), -1 where not resident; returns the number of "
             "those that are. This is not a use.")
        .def("residents", &SlotTable::residents, nb::arg("rows").noconvert(),
             nb::arg("slots").noconvert(),
             "All resident rows, ascending, and their slots; returns how many they are.")
        .def("drop", &SlotTable::drop, nb::arg("ids").noconvert(),
             "Rows that are gone, or whose slots no longer hold what the host store has: free their "
             "slots. What is expected of their ids stays.")
        .def("rename", &SlotTable::rename, nb::arg("ids").noconvert(), nb::arg("to").noconvert(),
             "Row ids[i] is now row to[i], which was not resident. Its slot stays.")
        .def("expect_like", &SlotTable::expect_like, nb::arg("ids").noconvert(),
             nb::arg("rows").noconvert(),
             "The views that are expected to need row ids[i] will need row rows[i], too.")
        .def("permute", &SlotTable::permute, nb::arg("order").noconvert(),
             "Row order[i] is now row i; slots stay.")
        .def("resize", &SlotTable::resize, nb::arg("n_slots"), nb::arg("n_rows"),
             "Add slots, and rows behind the last one, or take such away that are not resident.")
        .def("clear", &SlotTable::clear, nb::arg("n_rows").none() = nb::none(),
             "Empty all slots; optionally, set a new number of rows.");
}

}  // namespace gsscale
