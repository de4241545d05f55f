// Decoding: attention of the newest tokens of each batch entry to its cache. See
// attention/decode/kernel.h.
#pragma once

#include "attention/params.h"

namespace gk {

struct AttentionDecode {
    AttentionCall call;  // Tk: room for keys; key_lengths: keys of each entry
    const void* q;       // (B, Tq, H, D)
    const void* k;       // (B, Tk, Hk, D), or pages (cache_pages, page, Hk, D)
    const void* v;       // likewise
    Strides q_strides, k_strides, v_strides;  // batch: from one entry, or page, to the next
    const int32_t* block_table;               // (B, pages), numbers of pages; or null
    int pages, page, cache_pages;             // Tk = pages * page
    int num_splits;                           // 0: none is given
    int splits;  // the most splits that an entry can have; the launcher sets it
    // Workspaces of the sizes that attention_decode_workspaces returns; null where the size is 0.
    float* partial_out;    // (B, Hk, splits, Tq H / Hk, D rounded up to a multiple of 4)
    float* partial_stats;  // (B, Hk, splits, Tq H / Hk, 2): maximum and sum, as RowState
    void* out;             // (B, Tq, H, D) contiguous
    float* lse;            // (B, H, Tq)
};

// Numbers of elements, 0 where no entry has several splits. Only the GPU knows the lengths, so the
// workspaces have room for full caches: 64 entries of 64 heads 128 wide, with room for 16,384 keys,
// take 134 MB for each new token. Only the part that the lengths need is touched.
struct DecodeWorkspaces {
    int64_t partial_out, partial_stats;
};

// Reads every member of p but the workspaces.
DecodeWorkspaces attention_decode_workspaces(const AttentionDecode& p);

void launch_attention_decode(DType dtype, const AttentionDecode& p, Stream stream);

}  // namespace gk
