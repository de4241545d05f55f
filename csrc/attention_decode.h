// Decoding: attention of the newest tokens of each batch entry to its cache. See
// attention_decode_kernel.h.
#pragma once

#include "attention.h"

namespace gk {

// Keys of an entry go in splits of so many, the last one maybe fewer, each softmaxed by itself before
// they are combined. The rule is that of gptkernels/attention_splits.py: it follows from the entry's
// own length and from num_splits alone, 0 where none is given.
constexpr int kSplitKeys = 256, kMostSplits = 64;
constexpr int kSplitMultiple = 64;

__device__ inline int keys_of_split(int length, int num_splits) {
    const int last = max(length, 1) - 1;
    if (num_splits == 0) return kSplitKeys * (last / (kSplitKeys * kMostSplits) + 1);
    return kSplitMultiple * (last / num_splits / kSplitMultiple + 1);
}

struct AttentionDecode {
    AttentionCall call;  // Tk: keys that there is room for; key_lengths: of each entry; right: 0
    const void* q;       // (B, Tq, H, D)
    const void* k;       // (B, Tk, Hk, D), or pages (cache_pages, page, Hk, D)
    const void* v;       // likewise
    Strides q_strides, k_strides, v_strides;  // batch: from one entry, or page, to the next
    const int32_t* block_table;               // (B, pages), numbers of pages; or null
    int pages, page, cache_pages;             // Tk = pages * page
    int num_splits;                           // 0: none given
    int splits;                               // the most that an entry has
    // Workspaces, null where splits is 1. Nobody but the GPU knows the lengths, so they have room for
    // caches that are full: 64 entries of 64 heads of 128 with room for 16,384 keys take 134 MB for
    // each new token, of which only what the lengths need is touched.
    float* partial_out;    // (B, Hk, splits, Tq H / Hk, D rounded up to a multiple of 4)
    float* partial_stats;  // (B, Hk, splits, Tq H / Hk, 2): maximum and sum, as RowState
    void* out;             // (B, Tq, H, D) contiguous
    float* lse;            // (B, H, Tq)
};

void launch_attention_decode(DType dtype, const AttentionDecode& p, Stream stream);

}  // namespace gk
