// What attention's kernels share: which keys a query sees, its scores, and a softcap's derivative.
//
// Query i stands at position i + Tk - Tq among the keys (bottom-right alignment). It sees key j
// where position - left <= j <= position + right and 0 <= j < count, the number of keys of its
// batch entry. Scores are in units of log2(e), so that weights are exp2(s - m).
#pragma once

#include "attention/shape.h"
#include "device/tile.h"

namespace gk {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < INFINITY; }

// The integers first <= x < last; there are none where last <= first. The blocks from full_first to
// full_last, both multiples of the block, need no mask: every pair in them is visible. There may be
// no such block.
struct Range {
    int first, last, full_first, full_last;

    __device__ bool needs_mask(int start, int block) const {
        return start < full_first || start + block > full_last;
    }
};

// The band of keys that the queries of one batch entry see.
struct Band {
    int shift;        // Tk - Tq
    int left, right;  // at most Tk and Tq, which exclude no pair
    int Tq;
    int count;        // keys that exist

    __device__ int lowest(int i) const { return i + shift - left; }
    __device__ int reach(int i) const { return i + shift + right; }
    __device__ int highest(int i) const { return min(reach(i), count - 1); }
    __device__ bool sees(int i, int j) const { return j >= lowest(i) && j <= highest(i); }

    // Keys that at least one query i0 <= i < min(i0 + rows, Tq) sees; first is a multiple of block.
    __device__ Range keys(int i0, int rows, int block) const {
        const int end = min(i0 + rows, Tq);
        Range r;
        r.first = max(lowest(i0), 0) / block * block;
        r.last = highest(end - 1) + 1;
        r.full_first = (max(lowest(end - 1), 0) + block - 1) / block * block;
        r.full_last = max(highest(i0) + 1, 0) / block * block;
        return r;
    }

    // Queries that see at least one of the keys j0 <= j < j0 + cols; first is a multiple of block.
    // If these keys reach past the last key, every block of queries needs its mask.
    __device__ Range queries(int j0, int cols, int block) const {
        const int end = min(j0 + cols, count);
        Range r;
        r.first = max(j0 - shift - right, 0) / block * block;
        r.last = j0 < count ? min(end - shift + left, Tq) : 0;
        r.full_first = (max(j0 + cols - 1 - shift - right, 0) + block - 1) / block * block;
        r.full_last = min(max(j0 - shift + left + 1, 0), Tq) / block * block;
        if (end < j0 + cols) r.full_last = 0;
        return r;
    }
};

// The tokens of a batch entry or, with cu_seqlens, of one of the sequences that lie end to end.
struct Entry {
    int in_memory;  // index of the batch entry of the tensors that holds these tokens
    int q0, k0;     // index of the first query and of the first key in that batch entry
    int Tq, Tk;     // number of queries and of keys

    // The offset of row i of head h in lse and tensors of its shape, (entries, H, total_q).
    __device__ int64_t row(const AttentionCall& c, int h, int i) const {
        return (static_cast<int64_t>(in_memory) * c.H + h) * c.total_q + q0 + i;
    }
    // The offset of the first element of head h in a contiguous tensor (entries, total_q, H, D).
    __device__ int64_t queries(const AttentionCall& c, int h) const {
        return ((static_cast<int64_t>(in_memory) * c.total_q + q0) * c.H + h) * c.D;
    }
    // The offset of the first element of key head hk in a contiguous tensor (entries, total_k, Hk,
    // D).
    __device__ int64_t keys(const AttentionCall& c, int hk) const {
        return ((static_cast<int64_t>(in_memory) * c.total_k + k0) * c.Hk + hk) * c.D;
    }
    // The offset of the first element of token i of a head; i counts from `first`, which is q0 or
    // k0.
    __device__ int64_t at(const Strides& strides, int first, int i, int head) const {
        return in_memory * strides.batch + head * strides.head +
               (static_cast<int64_t>(first) + i) * strides.token;
    }
};

__device__ inline Entry entry_of(const AttentionCall& c, int b) {
    Entry entry{b, 0, 0, c.Tq, c.Tk};
    if (c.ragged()) {
        entry.in_memory = 0;
        entry.q0 = min(max(c.cu_seqlens_q[b], 0), c.total_q);
        entry.k0 = min(max(c.cu_seqlens_k[b], 0), c.total_k);
        entry.Tq = max(min(c.cu_seqlens_q[b + 1], c.total_q) - entry.q0, 0);
        entry.Tk = max(min(c.cu_seqlens_k[b + 1], c.total_k) - entry.k0, 0);
    }
    return entry;
}

// The number of blocks of `rows` queries, or keys, into which the work of one head is divided. With
// cu_seqlens each sequence starts a block of its own: sequence b starts block cu_seqlens[b] / rows
// + b, and its last block may be partly filled. Whatever the lengths are, few blocks have no work.
__host__ __device__ inline int query_blocks(const AttentionCall& c, int rows) {
    return c.ragged() ? c.total_q / rows + c.batch : (c.Tq + rows - 1) / rows;
}
__host__ __device__ inline int key_blocks(const AttentionCall& c, int rows) {
    return c.ragged() ? c.total_k / rows + c.batch : (c.Tk + rows - 1) / rows;
}

// Where a block starts: its batch entry or sequence b, and the token `start` in b. A block that has
// no work starts past the last token.
struct Place {
    int b, start;
};

// The place of block `block` of batch entry `entry` of the tensors. Whole warps call this together.
__device__ inline Place place_of(bool ragged, int entry, int block, int rows,
                                 const int32_t* cu_seqlens, int batch, int total) {
    if (!ragged) return {entry, block * rows};
    const auto first_block = [&](int b) { return min(max(cu_seqlens[b], 0), total) / rows + b; };
    int begun = 0;  // sequences whose first block is this block or an earlier one
    for (int first = 0; first == begun && first < batch; first += 32) {
        const int b = first + lane_index();
        begun += __popc(__ballot_sync(0xffffffffu, b < batch && first_block(b) <= block));
    }
    if (begun == 0) return {0, total};
    const int64_t start = static_cast<int64_t>(block - first_block(begun - 1)) * rows;
    return {begun - 1, static_cast<int>(start < total ? start : total)};
}
__device__ inline Place place_of_queries(const AttentionCall& c, int entry, int block, int rows) {
    return place_of(c.ragged(), entry, block, rows, c.cu_seqlens_q, c.batch, c.total_q);
}
__device__ inline Place place_of_keys(const AttentionCall& c, int entry, int block, int rows) {
    return place_of(c.ragged(), entry, block, rows, c.cu_seqlens_k, c.batch, c.total_k);
}

// Fills the rows of the tokens that belong to no sequence, before the first one and past the last
// one, with `value`. rows: (total, width) contiguous. `threads` threads share the work.
template <class T>
__device__ void fill_outside(T* rows, int64_t width, const int32_t* cu_seqlens, int batch,
                             int total, T value, int64_t thread, int64_t threads) {
    const int first = min(max(cu_seqlens[0], 0), total);
    const int end = max(min(cu_seqlens[batch], total), first);
    const int64_t before = first * width, within = (end - first) * width;
    for (int64_t i = thread; i < total * width - within; i += threads)
        rows[i < before ? i : i + within] = value;
}

__device__ inline Band band_of(const AttentionCall& c, const Entry& entry) {
    const int Tq = entry.Tq, Tk = entry.Tk;
    Band band;
    band.shift = Tk - Tq;
    band.left = c.left < 0 ? Tk : min(c.left, Tk);
    band.right = c.right < 0 ? Tq : min(c.right, Tq);
    band.Tq = Tq;
    band.count = c.key_lengths == nullptr ? Tk : min(max(c.key_lengths[entry.in_memory], 0), Tk);
    return band;
}

// The band of batch entry b of a call without cu_seqlens.
__device__ inline Band band_of(const AttentionCall& c, int b) {
    return band_of(c, Entry{b, 0, 0, c.Tq, c.Tk});
}

// Whether scores are just scale * product with a positive scale, and there is no dropout. The order
// of such scores is the order of the products.
inline bool scores_are_plain(const AttentionCall& c) {
    return c.softmax_scale > 0 && c.softcap == 0 && c.alibi_slopes == nullptr &&
           c.dropout.rng == nullptr;
}

// Scores from products q.k, for one head. exp(s) is computed as exp2(log2(e) s - m), which is one
// multiply-add before exp2: a score in units of log2(e) would be rounded once more, and a score far
// from 0 (ALiBi, where the nearest key is far) would lose digits of its weight.
struct Score {
    float scale;    // with a softcap: divided by it
    float softcap;  // or 0
    float slope;    // the head's ALiBi slope, or 0
    float factor;   // scale log2(e): what the multiply-add takes where scores stay plain products

    // distance = position - j. slope_of_cap = ds / d(scale * product), 1 without a softcap.
    __device__ float operator()(float product, int distance, float& slope_of_cap) const {
        float s = product * scale;
        slope_of_cap = 1;
        if (softcap != 0) {
            const float t = tanhf(s);
            s = softcap * t;
            slope_of_cap = 1 - t * t;
        }
        return fmaf(-slope, fabsf(static_cast<float>(distance)), s);
    }

};

// b: the batch entry or, with cu_seqlens, the sequence.
__device__ inline Score score_of_head(const AttentionCall& c, int b, int h) {
    Score score;
    score.scale = c.softcap > 0 ? c.softmax_scale / c.softcap : c.softmax_scale;
    score.softcap = c.softcap;
    score.factor = c.softmax_scale * kLog2e;
    score.slope = c.alibi_slopes == nullptr ? 0 : c.alibi_slopes[b * c.alibi_stride + h];
    return score;
}

}  // namespace gk
