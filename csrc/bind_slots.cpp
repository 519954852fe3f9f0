// Which row of the host store is in which slot of a cache in GPU memory, and which leaves first:
// the row that will be needed last, as far as the coming views are known (Belady's rule). Rows that
// are neighbours are needed by the same views, so what is known is known of blocks of rows: to look
// at each row for each view would take longer than the view's rows take to cross the link.
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
#include "permute.h"

namespace gsscale {

namespace {

using Moves = nb::ndarray<int32_t, nb::shape<-1, 3>, nb::c_contig, nb::device::cpu>;

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

// Views that can be told in advance; view v is bit v % 32 of a block's mask.
constexpr int64_t kAheadBits = 32, kMostAhead = 30;

// Neighbours that leave in the same order: rows are in Morton order.
constexpr int64_t kBlock = 64;

// Blocks' rows leave in descending order of their bucket. From 33 on, no view is known to need the
// block: 33 + the number of views since the last one, up to 31. From 1 on: 1 + the distance to the
// next view that does. 0: some of the block's rows are protected, but others may leave.
constexpr int kUnknown = 33, kBuckets = kUnknown + 32;

constexpr int kPartsPerThread = 16;

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

struct Block {
    int32_t residents = 0;  // of its rows
    int32_t used = -1;      // the last view that used one of its rows
    uint32_t ahead = 0;     // views that are expected to need one
};

// Changes of blocks' residents by one thread, block by block: an atomic addition each, not one for
// each row.
struct Tally {
    std::vector<Block> &blocks;
    int64_t block = -1;
    int32_t change = 0;

    void add(int64_t its_block, int32_t by) {
        if (its_block != block) flush(its_block);
        change += by;
    }
    void flush(int64_t next) {
        if (block >= 0) {
#pragma omp atomic
            blocks[block].residents += change;
        }
        block = next;
        change = 0;
    }
    ~Tally() { flush(-1); }
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
        if (!fresh) throw std::bad_alloc();
        table_.reset(fresh);
        n_rows_ = n;
        blocks_.assign(blocks_of(n), Block());
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
                --block_of(ids[i]).residents;
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
            Block &before = block_of(from[i]), &now = block_of(to[i]);
            if (table_[from[i]].slot_plus_1 > 0) {
                --before.residents;
                ++now.residents;
            }
            now.used = std::max(now.used, table_[from[i]].view);
            now.ahead |= before.ahead;
            table_[to[i]] = table_[from[i]];
            table_[from[i]] = {0, -1};
        }
    }

    void expect_like(Ids from_, Ids to_) {
        const int64_t n = check_pairs(from_, to_);
        const int32_t *from = from_.data(), *to = to_.data();
        for (int64_t i = 0; i < n; ++i) block_of(to[i]).ahead |= block_of(from[i]).ahead;
    }

    void permute(Ids order_) {
        const int64_t n = (int64_t)order_.shape(0);
        const int32_t *order = order_.data();
        require(n == n_rows_ && all_below(n, order, nullptr, n), "order must be of all rows");
        nb::gil_scoped_release release;
        end_protection();
        std::vector<Block> blocks(blocks_of(n));
        const int threads = threads_for_ids(n);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t b = 0; b < (int64_t)blocks.size(); ++b) {
            Block &block = blocks[b];
            for (int64_t row = b * kBlock; row < std::min(n, (b + 1) * kBlock); ++row) {
                const Residence &its = table_[order[row]];
                block.residents += its.slot_plus_1 > 0;
                block.used = std::max(block.used, its.view);
                block.ahead |= block_of(order[row]).ahead;
            }
        }
        permute_in_place(table_.get(), sizeof(Residence), order, n);
        blocks_ = std::move(blocks);
    }

    void resize(int64_t n_slots, int64_t n_rows) {
        require(n_slots_ <= n_slots && n_slots <= kMost, "slots can only be added");
        require(0 <= n_rows && n_rows <= kMost, "n_rows must be between 0 and 2^31 - 1");
        for (int64_t row = n_rows; row < n_rows_; ++row)
            require(table_[row].slot_plus_1 == 0, "a row that is to go is resident: drop it first");
        end_protection();
        Residence *moved = (Residence *)std::realloc(
            table_.get(), std::max<int64_t>(n_rows, 1) * sizeof(Residence));
        if (!moved) throw std::bad_alloc();
        (void)table_.release();
        table_.reset(moved);
        if (n_rows > n_rows_)
            std::memset((void *)(moved + n_rows_), 0, (n_rows - n_rows_) * sizeof(Residence));
        blocks_.resize(blocks_of(n_rows));  // no row of those that go is resident
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
        const uint32_t bit = uint32_t(1) << (view % kAheadBits);
        const int parts = threads_for_ids(n);
#pragma omp parallel for num_threads(parts) schedule(static, 1)
        for (int part = 0; part < parts; ++part) {
            int64_t last = -1;
            for (int64_t i = part_start(n, part, parts); i < part_start(n, part + 1, parts); ++i) {
                if (ids[i] / kBlock == last) continue;
                last = ids[i] / kBlock;
#pragma omp atomic
                blocks_[last].ahead |= bit;  // two threads may meet in one block
            }
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
        // The memory of a list that is no longer needed serves for the new one: fresh pages cost more
        // than the copy.
        std::vector<int32_t> list;
        while (!views_.empty() && views_.front().view < protect_from) {
            list = std::move(views_.front().rows);
            views_.pop_front();
        }
        list.assign(ids, ids + n);
        if (n > 0) views_.push_back({(int32_t)view, std::move(list)});
        // The rows fit, and so do the lists: from here on the table changes.
        forget_expected(view);
        last_view_ = view;
        protected_from_ = protect_from;
        const int64_t misses = use(ids, n, (int32_t)view, slots, rows_in_.data());
        const int64_t newest =
            choose_slots(misses, protect_from, slots_in_.data(), rows_out_.data());
        Residence *table = table_.get();
        const int parts = threads_for_ids(misses);
#pragma omp parallel for num_threads(parts) schedule(static, 1)
        for (int part = 0; part < parts; ++part) {
            Tally come{blocks_}, gone{blocks_};
            const int64_t end = part_start(misses, part + 1, parts);
            for (int64_t k = part_start(misses, part, parts); k < end; ++k) {
                const int32_t in = rows_in_[k], slot = slots_in_[k], out = rows_out_[k];
                if (out >= 0) {
                    table[out] = {0, -1};
                    gone.add(out / kBlock, -1);
                }
                slots[places_[k]] = slot;
                table[in].slot_plus_1 = slot + 1;
                come.add(in / kBlock, 1);
                moves[3 * k] = in;
                moves[3 * k + 1] = slot;
                moves[3 * k + 2] = out;
            }
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
    int64_t protected_from_ = std::numeric_limits<int64_t>::min();
    std::unique_ptr<Residence[], Free> table_;
    std::vector<Block> blocks_;
    std::vector<uint8_t> buckets_;  // per block, while slots are chosen
    std::deque<ViewRows> views_;    // protected, at the last call; oldest first
    // Of the misses of the present call: where they are in its ids, and what moves.
    std::vector<int32_t> places_, rows_in_, slots_in_, rows_out_;

    Block &block_of(int64_t row) { return blocks_[row / kBlock]; }

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

    // Views up to `view` have been, or will not be: their bits are those of later views now.
    void forget_expected(int64_t view) {
        uint32_t past = 0;
        for (int64_t v = std::max(last_view_ + 1, view - kAheadBits + 1); v <= view; ++v)
            past |= uint32_t(1) << (v % kAheadBits);
        const int64_t n = (int64_t)blocks_.size();
        const int threads = threads_for_ids(n);
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t b = 0; b < n; ++b) blocks_[b].ahead &= ~past;
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
            int64_t k = begin, last = -1;
            for (int64_t i = begin; i < end; ++i) {
                if (i + kAhead < end) __builtin_prefetch(table + ids[i + kAhead], 1);
                Residence &row = table[ids[i]];
                row.view = view;
                if (ids[i] / kBlock != last) {
                    last = ids[i] / kBlock;
#pragma omp atomic write
                    blocks_[last].used = view;
                }
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

        const int64_t n = (int64_t)blocks_.size();
        const int threads = threads_for_ids(n + leaving);
        // The rows that leave are neighbours, those of an earlier view: with one part of the rows for
        // each thread, one or two threads would have all of the work.
        const int parts = threads > 1 ? kPartsPerThread * threads : 1;
        buckets_.resize(n);
        std::vector<int64_t> counts((size_t)parts * kBuckets, 0);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (int part = 0; part < parts; ++part) {
            int64_t *count = &counts[(size_t)part * kBuckets];
            for (int64_t b = part_start(n, part, parts); b < part_start(n, part + 1, parts); ++b) {
                buckets_[b] = bucket_of(blocks_[b], protect_from);
                if (buckets_[b] > 0) count[buckets_[b]] += blocks_[b].residents;
            }
        }
        const auto total = [&](int bucket) {
            int64_t sum = 0;
            for (int part = 0; part < parts; ++part) sum += counts[(size_t)part * kBuckets + bucket];
            return sum;
        };
        // Everything above bucket `last` leaves, and so many of `last` as are still missing.
        int last = kBuckets - 1;
        int64_t above = 0;
        while (last > 0 && above + total(last) < leaving) above += total(last--);
        if (last == 0) {
            // Close: the rows that are not protected count one by one.
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
            for (int part = 0; part < parts; ++part) {
                int64_t &count = counts[(size_t)part * kBuckets];
                for_each_leaving(part, parts, protect_from, 0, 0, [&](int64_t) { ++count; });
            }
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
        const Residence *table = table_.get();
        int32_t newest = -1;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(max : newest)
        for (int part = 0; part < parts; ++part) {
            int64_t k = starts[part], quota = quotas[part];
            for_each_leaving(part, parts, protect_from, last, kBuckets - 1, [&](int64_t row) {
                if (buckets_[row / kBlock] == last && quota-- <= 0) return;
                rows_out[k] = (int32_t)row;
                slots_in[k++] = table[row].slot_plus_1 - 1;
                newest = std::max(newest, table[row].view);
            });
        }
        return newest;
    }

    // Calls `visit(row)` for the rows of a part that may leave, ascending, of the blocks
    // in buckets `first` to `last`.
    template <typename Visit>
    void for_each_leaving(int part, int parts, int64_t protect_from, int first, int last,
                          Visit visit) const {
        const int64_t n = (int64_t)blocks_.size();
        for (int64_t b = part_start(n, part, parts); b < part_start(n, part + 1, parts); ++b) {
            if (blocks_[b].residents == 0 || buckets_[b] < first || buckets_[b] > last) continue;
            for (int64_t row = b * kBlock; row < std::min(n_rows_, (b + 1) * kBlock); ++row)
                if (table_[row].slot_plus_1 > 0 && table_[row].view < protect_from &&
                    table_[row].view != last_view_)
                    visit(row);
        }
    }

    uint8_t bucket_of(const Block &block, int64_t protect_from) const {
        if (block.used >= protect_from || block.used == last_view_) return 0;
        // Bit 0 is the next view.
        const int turn = (int)((last_view_ + 1) % kAheadBits);
        const uint32_t mask =
            turn ? block.ahead >> turn | block.ahead << (kAheadBits - turn) : block.ahead;
        if (mask) return (uint8_t)(1 + __builtin_ctz(mask));
        return (uint8_t)(kUnknown + std::min<int64_t>(31, last_view_ - block.used));
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
             "`ids` (ascending).")
        .def("plan", &SlotTable::plan, nb::arg("ids").noconvert(), nb::arg("view"),
             nb::arg("protect_from"), nb::arg("slots").noconvert(), nb::arg("moves").noconvert(),
             "Give each row of `ids` (ascending) a slot, slots[i], for view number `view`, higher "
             "than any before. moves[k] = (row, slot, row that leaves it) tells of the k-th row "
             "that was not resident, in ascending order of the rows; the row that leaves is "
             "-1 where it was empty. Rows leave block by block, 64 rows by 64: those that no view "
             "is known to need first, those used longest ago before others; then those needed "
             "last. Of equals the lower row leaves. Rows of `ids` or used by a view >= "
             "protect_from, which never goes back, stay, and others of their blocks leave last. "
             "Returns the number of rows that were not resident and the newest view that used any "
             "of those that leave, or -1; or None, and changes nothing, if the rows do not fit.")
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
