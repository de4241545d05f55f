// Which keys a query sees, and how queries are grouped.
//
// The queries of one head are taken kLanes at a time, one in each lane of a row of scores; the rows
// are keys. So the maximum and the sum of a softmax go down the rows, and no lane waits for
// another.
#pragma once

#include "cpu/attention/params.h"
#include "cpu/vec.h"

namespace gk::cpu::GK_ISA {

static inline int64_t least_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most_of(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t within(int64_t x, int64_t least, int64_t most) {
    return least_of(most_of(x, least), most);
}
static inline int64_t up_to(int64_t x, int64_t multiple) {
    return (x + multiple - 1) / multiple * multiple;
}

// One entry of the batch: where its tokens lie, and the band of keys that its queries see.
struct Entry {
    int64_t batch;               // of the tensors
    int64_t first_q, first_k;    // its first tokens there
    int64_t Tq, Tk;
    int64_t count;               // keys that exist
    int64_t left, right;
    const float* slopes;  // (H,), or null

    Entry(const AttentionCall& c, int64_t b)
        : batch(b), first_q(0), first_k(0), Tq(c.Tq), Tk(c.Tk),
          slopes(c.alibi_slopes == nullptr ? nullptr : c.alibi_slopes + b * c.alibi_stride) {
        if (c.cu_seqlens_q != nullptr) {
            batch = 0;
            first_q = within(c.cu_seqlens_q[b], 0, c.Tq);
            first_k = within(c.cu_seqlens_k[b], 0, c.Tk);
            Tq = most_of(within(c.cu_seqlens_q[b + 1], 0, c.Tq) - first_q, 0);
            Tk = most_of(within(c.cu_seqlens_k[b + 1], 0, c.Tk) - first_k, 0);
        }
        count = c.key_lengths == nullptr ? Tk : within(c.key_lengths[b], 0, Tk);
        left = c.left < 0 ? Tq + Tk : c.left;
        right = c.right < 0 ? Tq + Tk : c.right;
    }

    int64_t position(int64_t i) const { return i + Tk - Tq; }
    // The keys lowest ... highest; there are none where highest < lowest.
    int64_t lowest(int64_t i) const { return most_of(position(i) - left, 0); }
    int64_t highest(int64_t i) const { return least_of(position(i) + right, count - 1); }
    // The queries that see key j, likewise, if it exists.
    int64_t lowest_query(int64_t j) const { return most_of(j - right + Tq - Tk, 0); }
    int64_t highest_query(int64_t j) const { return least_of(j + left + Tq - Tk, Tq - 1); }
};

// The queries first ... first + count - 1 of a head; count <= kLanes. `first` is a multiple of
// kLanes. Lanes past them repeat the last query where scores are masked, and nobody reads them.
struct Group {
    int64_t head, first;
    int count;

    int64_t last() const { return first + count - 1; }
};

// The keys of a block that a group sees, as rows of the block. In the rows full_first ... full_last
// - 1 every query sees the key. `first` is a multiple of kStep.
struct Rows {
    int first, last, full_first, full_last;

    Rows(const Entry& e, const Group& g, int64_t j0, int keys) {
        constexpr int kStep = 32;
        const auto row = [&](int64_t j) { return static_cast<int>(within(j - j0, 0, keys)); };
        first = row(e.lowest(g.first)) / kStep * kStep;
        last = row(e.highest(g.last()) + 1);
        full_first = static_cast<int>(most_of(row(e.lowest(g.last())), first));
        full_last = static_cast<int>(most_of(row(e.highest(g.first) + 1), full_first));
        if (full_last > last) full_first = full_last = last;
    }
    bool none() const { return last <= first; }
};

}  // namespace gk::cpu::GK_ISA
