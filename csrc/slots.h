// Which row of the host store is in which slot of a cache in GPU memory, and which leaves first:
// the row that will be needed last, as far as the coming views are known (Belady's rule). Rows that
// are neighbours are needed by the same views, so what is known is known of blocks of rows: to look
// at each row for each view would take longer than the view's rows take to cross the link.
#pragma once

#include <cstdlib>
#include <deque>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "buffers.h"

namespace gsscale {

using Moves = nb::ndarray<int32_t, nb::shape<-1, 3>, nb::c_contig, nb::device::cpu>;

// Neighbours that leave in the same order: rows are in Morton order.
constexpr int64_t kBlock = 64;

// Views that can be told in advance; view v is bit v % 32 of a block's mask.
constexpr int64_t kAheadBits = 32, kMostAhead = 30;

// Ids ahead whose entries are requested: the hardware stops at the gaps between ids.
constexpr int64_t kAhead = 64;

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

inline int64_t slot_blocks_of(int64_t rows) { return (rows + kBlock - 1) / kBlock; }

inline void require(bool condition, const char *message) {
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

// The rows that a view used, ascending.
struct ViewRows {
    int32_t view;
    std::vector<int32_t> rows;
};

// What the methods do is said in bind_slots.cpp, for Python. slots.cpp has those that follow rows,
// slot_plan.cpp those that choose what leaves.
class SlotTable {
  public:
    SlotTable(int64_t n_slots, int64_t n_rows);

    int64_t n_slots() const { return n_slots_; }
    int64_t n_rows() const { return n_rows_; }
    int64_t in_use() const { return in_use_; }

    void clear(std::optional<int64_t> n_rows);
    int64_t lookup(Ids ids, Ids slots) const;
    int64_t residents(Ids rows, Ids slots) const;

    void expect(Ids ids, int64_t view);
    std::optional<std::pair<int64_t, int64_t>> plan(Ids ids, int64_t view, int64_t protect_from,
                                                    Ids slots, Moves moves);

    // Rows that change; the next plan cannot protect rows of views before it.
    void drop(Ids ids);
    void rename(Ids from, Ids to);
    void expect_like(Ids from, Ids to);
    void permute(Ids order);
    void resize(int64_t n_slots, int64_t n_rows);

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

    void check_ids(const int32_t *ids, int64_t n) const;
    int64_t check_pairs(const Ids &from, const Ids &to) const;
    void end_protection();

    void forget_expected(int64_t view);
    int64_t use(const int32_t *ids, int64_t n, int32_t view, int32_t *slots, int32_t *rows_in);
    bool fits(const int32_t *ids, int64_t n, int64_t protect_from) const;
    int64_t choose_slots(int64_t misses, int64_t protect_from, int32_t *slots_in,
                         int32_t *rows_out);
    template <typename Visit>
    void for_each_leaving(int part, int parts, int64_t protect_from, int first, int last,
                          Visit visit) const;
    uint8_t bucket_of(const Block &block, int64_t protect_from) const;
};

}  // namespace gsscale
