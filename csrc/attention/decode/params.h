// Decoding: attention of the newest tokens of each batch entry to its cache. See
// attention/decode/kernel.h.
#pragma once

#include "attention/params.h"

namespace gk {

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
    // Workspaces, null where splits is 1. Nobody but the GPU knows the lengths, so they have room
    // for caches that are full: 64 entries of 64 heads of 128 with room for 16,384 keys take 134 MB
    // for each new token, of which only what the lengths need is touched.
    float* partial_out;    // (B, Hk, splits, Tq H / Hk, D rounded up to a multiple of 4)
    float* partial_stats;  // (B, Hk, splits, Tq H / Hk, 2): maximum and sum, as RowState
    void* out;             // (B, Tq, H, D) contiguous
    float* lse;            // (B, H, Tq)
};

void launch_attention_decode(DType dtype, const AttentionDecode& p, Stream stream);

}  // namespace gk
