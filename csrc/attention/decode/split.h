// Which keys a CTA of attention/decode/kernel.h takes, and where the results of its rows go.
#pragma once

#include <algorithm>

#include "attention/decode/params.h"
#include "attention/scores.h"
#include "device/exp2.h"

namespace gk {

// The keys of an entry are divided into splits of equally many keys; the last split may have fewer.
// Each split has a softmax of its own, and then the splits are combined. The rule is that of
// gptkernels/ops/attention/splits.py: the number of keys in a split follows from the entry's own
// length and from num_splits (0: none is given) alone.
constexpr int kSplitKeys = 256, kMostSplits = 64;
constexpr int kSplitMultiple = 64;

// The most splits that an entry of up to `capacity` keys has.
inline int most_splits(int capacity, int num_splits) {
    const int keys = num_splits == 0 ? kSplitKeys : kSplitMultiple;
    return std::min(num_splits == 0 ? kMostSplits : num_splits, (capacity - 1) / keys + 1);
}

__device__ inline int keys_of_split(int length, int num_splits) {
    const int last = max(length, 1) - 1;
    if (num_splits == 0) return kSplitKeys * (last / (kSplitKeys * kMostSplits) + 1);
    return kSplitMultiple * (last / num_splits / kSplitMultiple + 1);
}

struct DecodeArguments {
    AttentionDecode p;
    int group, rows, row_blocks;  // H / Hk; group * Tq; blocks of rows
    bool plain;                   // scores_are_plain
    bool q_aligned, k_aligned, v_aligned, out_aligned;  // all rows start at 16-byte addresses
};

// Returns how many rows a CTA takes. Each T is compiled in a translation unit of its own.
template <class T>
int launch_attention_decode_of(const DecodeArguments& a, Stream stream);

// The band of an entry. The entry's queries are its newest tokens.
__device__ inline Band decode_band(const AttentionCall& c, int b) {
    Band band;
    band.count = min(max(c.key_lengths[b], 0), c.Tk);
    band.shift = band.count - c.Tq;
    band.left = c.left < 0 ? band.count : min(c.left, band.count);
    band.right = c.right < 0 ? c.Tq : min(c.right, c.Tq);
    band.Tq = c.Tq;
    return band;
}

// The keys that a block of rows sees, and the splits first <= s < last, of `keys` keys each, that
// hold these keys. A block that sees no key has one split, which is empty.
struct DecodeSplits {
    Range seen;
    int keys, first, last;

    __device__ DecodeSplits(const DecodeArguments& a, const Band& band, int row_block,
                            int rows_of_block, int block) {
        const int row = row_block * rows_of_block;
        const int end = min(row + rows_of_block, a.rows);
        const int i0 = row / a.group;
        seen = band.keys(i0, (end - 1) / a.group + 1 - i0, block);
        keys = keys_of_split(band.count, a.p.num_splits);
        first = 0, last = 1;
        if (seen.last > seen.first) {
            first = seen.first / keys;
            last = (seen.last - 1) / keys + 1;
        }
    }
    __device__ bool has(int split) const { return split >= first && split < last; }
    __device__ bool one() const { return last - first == 1; }
};

// Where a row's result goes. T: out's dtype.
template <class T>
struct DecodeRow {
    int h;  // the query head
    T* out;
    float* lse;

    __device__ DecodeRow(const DecodeArguments& a, int b, int hk, int row) {
        const AttentionCall& c = a.p.call;
        const int i = row / a.group;
        h = hk * a.group + row % a.group;
        out = static_cast<T*>(a.p.out) + ((static_cast<int64_t>(b) * c.Tq + i) * c.H + h) * c.D;
        lse = a.p.lse + (static_cast<int64_t>(b) * c.H + h) * c.Tq + i;
    }
};

// The index of a row's partial result in the workspaces.
__device__ inline int64_t partial_of(const DecodeArguments& a, int b, int hk, int split, int row) {
    const int64_t head = static_cast<int64_t>(b) * a.p.call.Hk + hk;
    return (head * a.p.splits + split) * a.rows + row;
}
__host__ __device__ inline int partial_width(int D) { return (D + 3) / 4 * 4; }

// The factor of a result with maximum `own` when several results with maxima up to m are added.
template <class T>
__device__ __forceinline__ float weight_of(float own, float m) {
    return exp2_for<T>(own - (m == -INFINITY ? 0.0f : m));
}

}  // namespace gk
