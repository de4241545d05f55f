// Attention on a CPU: the parameters of both passes. The formulas are those of
// csrc/attention/params.h; here attn_mask is added to the scores too, or hides keys.
//
// Query i of an entry stands at position i + Tk - Tq among its keys.
#pragma once

#include "cpu/dropout/params.h"
#include "cpu/dtype.h"

namespace gk::cpu {

// Elements from one batch entry, token or head to the next; the last dimension has stride 1.
struct Strides {
    int64_t batch, token, head;
};

// attn_mask, broadcast to (B, H, Tq, Tk) by strides of 0; strides are in elements.
struct MaskStrides {
    int64_t batch, head, query, key;
};
enum class MaskKind : int32_t { none, visible, added };
struct Mask {
    const void* at;  // visible: bool, whether a query sees a key; added: to the scores
    MaskStrides by;
    MaskKind kind;
    DType dtype;  // of what is added
};

// With cu_seqlens the batch consists of sequences that lie end to end: the tensors have one entry
// of Tq and Tk tokens, and sequence b has the queries from cu_seqlens_q[b] up to cu_seqlens_q[b +
// 1], and its keys likewise. Tokens that belong to no sequence are not touched.
struct AttentionCall {
    int64_t batch, Tq, Tk, H, Hk, D, Dv;
    float softmax_scale;
    int64_t left, right;  // position - left <= j <= position + right; negative: no bound
    float softcap;        // 0: none
    const float* alibi_slopes;   // (H,), or (batch, H), or null
    int64_t alibi_stride;        // from one entry's slopes to the next one's: 0, or H
    const float* sinks;          // (H,), or null: one more score of each query, of no key
    const int32_t* key_lengths;  // (B,), or null; clamped to 0 ... Tk
    const int32_t* cu_seqlens_q;  // (batch + 1,), or null; clamped to 0 ... Tq
    const int32_t* cu_seqlens_k;  // (batch + 1,), null where cu_seqlens_q is
    Mask mask;
    Dropout dropout;
    DType dtype;  // of q, k, v, out and their gradients
};

struct AttentionFwd {
    AttentionCall call;
    const void* q;  // (B, Tq, H, D)
    const void* k;  // (B, Tk, Hk, D)
    const void* v;  // (B, Tk, Hk, Dv)
    Strides q_strides, k_strides, v_strides;
    void* out;   // (B, Tq, H, Dv) contiguous
    float* lse;  // (B, H, Tq)
};

struct AttentionBwd {
    AttentionCall call;
    const void* q;     // (B, Tq, H, D)
    const void* k;     // (B, Tk, Hk, D)
    const void* v;     // (B, Tk, Hk, Dv)
    const void* dout;  // (B, Tq, H, Dv)
    Strides q_strides, k_strides, v_strides, dout_strides;
    const void* out;    // (B, Tq, H, Dv) contiguous
    const float* lse;   // (B, H, Tq)
    const float* dlse;  // (B, H, Tq), or null
    void* dq;  // (B, Tq, H, D) contiguous, or null: not wanted
    void* dk;  // (B, Tk, Hk, D) contiguous, or null
    void* dv;  // (B, Tk, Hk, Dv) contiguous, or null
    float* dmask;  // with the mask's sizes, to which its gradient is added; or null
    MaskStrides dmask_strides;
    float* by_query;  // (B, H, Tq), sum_j ds |position - j|, ds that of the slopes; or null
    int64_t most_keys = 0;  // of an entry; the launcher sets it
};

// A group of queries, one in each lane of a row of scores, and the groups of a forward item.
constexpr int kLanes = 32, kMostGroups = 16;

// What one thread computes at a time: the queries first ... last - 1 of the query heads
// head ... last_head - 1, which share a key head, of one entry.
struct AttentionItem {
    int64_t entry, head, last_head, first, last;
};

// The same of the backward pass, and the keys that it gives gradients to. `first` and `first_key`
// are multiples of kPart, as blocks of queries and of keys are parts of kPart.
constexpr int kPart = 256;
struct BackwardItem : AttentionItem {
    int64_t first_key, last_key;
};

// The same of the mask's gradient: the entries and the query heads that share a part of the mask.
struct MaskItem {
    int64_t entry, last_entry, head, last_head, first, last;
};

// Every size is at least 1, D and Dv are at most 512. `threads`: the most that run.
void attention_fwd(const AttentionFwd& p, int threads);
void attention_bwd(const AttentionBwd& p, int threads);

}  // namespace gk::cpu
