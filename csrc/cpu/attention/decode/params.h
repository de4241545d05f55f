// Attention of the newest tokens of each batch entry to its cache of keys and values, on a CPU.
//
//     s = scale q.k;   s = softcap tanh(s / softcap);   s -= slope |position - j|;   masks
//     out = softmax(s) v                                lse = log sum_j exp(s)
//
// Query i of an entry with n keys stands at position n - Tq + i. It sees the keys j < n with
// position - left <= j <= position + right. A sink is one more score of its head's softmax, of no
// key. Query head h reads key head h / (H / Hk). All sums are in fp32.
//
// Bytes (the floor): the keys and values that an entry's queries see, read once for each block of
// rows. The rows are the query heads that share a key head, for every new token: row i H / Hk + h.
//
// An entry's keys are cut into splits by the rule of gptkernels/ops/attention/splits.py. One item
// of work is a split of a block of rows; threads share the items. Rows with several splits have
// partial results, which are combined in the splits' order.
#pragma once

#include "cpu/attention/params.h"

namespace gk::cpu {

struct AttentionDecode {
    const void* q;               // (B, Tq, H, D)
    const void* k;               // (B, Tk, Hk, D), or pages (cache_pages, page, Hk, D)
    const void* v;               // likewise, (..., Dv)
    const float* alibi_slopes;   // (H,), or (B, H), or null
    const float* sinks;          // (H,), or null
    const int32_t* key_lengths;  // (B,); clamped to 0 ... Tk
    const int32_t* block_table;  // (B, pages), numbers of pages; or null
    void* out;                   // (B, Tq, H, Dv) contiguous
    float* lse;                  // (B, H, Tq), or null
    Strides q_strides, k_strides, v_strides;  // batch: from one entry, or page, to the next
    int64_t batch, Tq, Tk, H, Hk, D, Dv;  // Tk: room for keys, pages * page where there are pages
    int64_t pages, page, cache_pages;  // numbers of pages are clamped to 0 ... cache_pages - 1
    int64_t left, right;               // negative: no bound
    int64_t alibi_stride;              // from one entry's slopes to the next one's: 0, or H
    int64_t num_splits;                // 0: none is given
    float softmax_scale, softcap;      // softcap 0: none
    DType dtype;
};

// All sizes are at least 1; D and Dv are at most kDecodeWidth. `threads`: the most that run.
void attention_decode(const AttentionDecode& p, int threads);

// ---- What the launcher and the kernels share.

// The most rows of a block, the keys that one softmax takes at once, and the widest head. The
// scratch memory of a thread holds the queries, results, scores, maxima and sums of a block's rows:
// at most 161 KB.
constexpr int64_t kDecodeRows = 32, kDecodeKeys = 256, kDecodeWidth = 512;

// Floats of a row of queries or results: its columns, rounded up to whole vectors of every
// instruction set.
static inline int64_t decode_width(int64_t columns) { return (columns + 15) / 16 * 16; }
static inline int64_t decode_scratch(int64_t rows, int64_t D, int64_t Dv) {
    return rows * (decode_width(D) + decode_width(Dv) + kDecodeKeys + 2);
}
// A block's partial result: its rows, head by head, without the division by their sums, (rows,
// decode_width(Dv)), then the maxima, (rows,), and the sums, (rows,).
static inline int64_t decode_partial(int64_t rows, int64_t Dv) {
    return rows * (decode_width(Dv) + 2);
}

// The rows first_row ... first_row + rows - 1 of each of the key heads hk ... hk + heads - 1, at
// most kDecodeRows in all. Several heads go together where a token's heads lie beside each other:
// their memory is then read from one end to the other.
struct DecodeRows {
    int64_t b, hk, heads, first_row, rows;
};

struct DecodeItem {
    DecodeRows rows;
    int64_t first, last;  // the keys of the split that the rows see, none where last <= first
    int64_t shift;        // query i stands at position i + shift
    float* partial;       // null: the rows have no other split, and out and lse are written
};

// Rows with several splits, whose partial results lie one after another.
struct DecodeSplits {
    DecodeRows rows;
    const float* partials;
    int64_t count;
};

}  // namespace gk::cpu
