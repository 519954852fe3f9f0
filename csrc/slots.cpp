// A slot table that follows rows: which are resident, and what becomes of them when rows change.
#include "slots.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "ids.h"
#include "permute.h"

namespace gsscale {

SlotTable::SlotTable(int64_t n_slots, int64_t n_rows) : n_slots_(n_slots) {
    require(0 <= n_slots && n_slots <= kMost, "n_slots must be between 0 and 2^31 - 1");
    clear(n_rows);
}

void SlotTable::clear(std::optional<int64_t> n_rows) {
    const int64_t n = n_rows.value_or(n_rows_);
    require(0 <= n && n <= kMost, "n_rows must be between 0 and 2^31 - 1");
    // calloc, because it takes no memory for rows that no view comes near.
    Residence *fresh = (Residence *)std::calloc(std::max<int64_t>(n, 1), sizeof(Residence));
    if (!fresh) throw std::bad_alloc();
    table_.reset(fresh);
    n_rows_ = n;
    blocks_.assign(slot_blocks_of(n), Block());
    in_use_ = handed_out_ = 0;
    free_.clear();
    views_.clear();
}

int64_t SlotTable::lookup(Ids ids, Ids slots) const {
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

int64_t SlotTable::residents(Ids rows_, Ids slots_) const {
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

void SlotTable::expect(Ids ids_, int64_t view) {
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

void SlotTable::drop(Ids ids_) {
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

void SlotTable::rename(Ids from_, Ids to_) {
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

void SlotTable::expect_like(Ids from_, Ids to_) {
    const int64_t n = check_pairs(from_, to_);
    const int32_t *from = from_.data(), *to = to_.data();
    for (int64_t i = 0; i < n; ++i) block_of(to[i]).ahead |= block_of(from[i]).ahead;
}

void SlotTable::permute(Ids order_) {
    const int64_t n = (int64_t)order_.shape(0);
    const int32_t *order = order_.data();
    require(n == n_rows_ && all_below(n, order, nullptr, n), "order must be of all rows");
    nb::gil_scoped_release release;
    end_protection();
    std::vector<Block> blocks(slot_blocks_of(n));
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

void SlotTable::resize(int64_t n_slots, int64_t n_rows) {
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
    blocks_.resize(slot_blocks_of(n_rows));  // no row of those that go is resident
    n_slots_ = n_slots;
    n_rows_ = n_rows;
}

void SlotTable::check_ids(const int32_t *ids, int64_t n) const {
    if (n == 0) return;
    require(ascending(ids, n), "ids must ascend");
    require(ids[0] >= 0 && ids[n - 1] < n_rows_, "row id outside of 0 .. n_rows - 1");
}

// How many they are: each id of `from` has one of `to`, in any order.
int64_t SlotTable::check_pairs(const Ids &from, const Ids &to) const {
    const int64_t n = (int64_t)from.shape(0);
    require((int64_t)to.shape(0) == n, "as many new ids as old ones are needed");
    require(all_below(n_rows_, from.data(), nullptr, n) &&
                all_below(n_rows_, to.data(), nullptr, n),
            "row id outside of 0 .. n_rows - 1");
    return n;
}

// The lists of protected rows name rows by ids that are about to change.
void SlotTable::end_protection() {
    views_.clear();
    protected_from_ = std::max(protected_from_, last_view_ + 1);
}

}  // namespace gsscale
