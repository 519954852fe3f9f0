// Slots for a view's rows, and which rows leave theirs for it.
#include <algorithm>

#include "ids.h"
#include "slots.h"

namespace gsscale {

namespace {

// Blocks' rows leave in descending order of their bucket. From 33 on, no view is known to need the
// block: 33 + the number of views since the last one, up to 31. From 1 on: 1 + the distance to the
// next view that does. 0: some of the block's rows are protected, but others may leave.
constexpr int kUnknown = 33, kBuckets = kUnknown + 32;

constexpr int kPartsPerThread = 16;

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

}  // namespace

std::optional<std::pair<int64_t, int64_t>> SlotTable::plan(Ids ids_, int64_t view,
                                                           int64_t protect_from, Ids slots_,
                                                           Moves moves_) {
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
    const int64_t newest = choose_slots(misses, protect_from, slots_in_.data(), rows_out_.data());
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

// Views up to `view` have been, or will not be: their bits are those of later views now.
void SlotTable::forget_expected(int64_t view) {
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
int64_t SlotTable::use(const int32_t *ids, int64_t n, int32_t view, int32_t *slots,
                       int32_t *rows_in) {
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
bool SlotTable::fits(const int32_t *ids, int64_t n, int64_t protect_from) const {
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

// Calls `visit(row)` for the rows of a part that may leave, ascending, of the blocks in buckets
// `first` to `last`.
template <typename Visit>
void SlotTable::for_each_leaving(int part, int parts, int64_t protect_from, int first, int last,
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

// A slot for each miss: empty ones first, then those of the rows that leave, in ascending order
// of the rows. Returns the newest view that used any of these, or -1.
int64_t SlotTable::choose_slots(int64_t misses, int64_t protect_from, int32_t *slots_in,
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

uint8_t SlotTable::bucket_of(const Block &block, int64_t protect_from) const {
    if (block.used >= protect_from || block.used == last_view_) return 0;
    // Bit 0 is the next view.
    const int turn = (int)((last_view_ + 1) % kAheadBits);
    const uint32_t mask =
        turn ? block.ahead >> turn | block.ahead << (kAheadBits - turn) : block.ahead;
    if (mask) return (uint8_t)(1 + __builtin_ctz(mask));
    return (uint8_t)(kUnknown + std::min<int64_t>(31, last_view_ - block.used));
}

}  // namespace gsscale
