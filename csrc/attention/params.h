// Attention's parameters, forward and backward, as the launchers take them.
//
//     s = scale q.k;   s = softcap tanh(s / softcap);   s -= slope |i + Tk - Tq - j|;   masks
//     out = dropout(softmax(s)) v                       lse = log sum_j exp(s)
//
// With sinks the softmax and lse are over the scores of a query and the sink of its head.
//
// q, k, v, out and their gradients have the launcher's dtype; everything else is fp32. Sizes are at
// least 1, D is at most 256, and H is a multiple of Hk. Query head h reads key head h / (H / Hk).
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/build.h"
#include "runtime/dropout.h"
#include "runtime/launch.h"

namespace gk {

// Elements from one batch entry, token or head to the next; the last dimension has stride 1.
struct Strides {
    int64_t batch, token, head;
};

// What both directions need to know. With cu_seqlens the batch consists of sequences that lie end
// to end: the tensors have one batch entry of total_q and total_k tokens, and sequence b has the
// queries from cu_seqlens_q[b] up to cu_seqlens_q[b + 1], and its keys likewise. A query that
// belongs to no sequence, before the first one or past the last one, has out 0 and lse -inf.
// Queries and keys that belong to no sequence have gradient 0.
struct AttentionCall {
    int batch, Tq, Tk, H, Hk, D;  // each entry's; with cu_seqlens the longest sequence's, for speed
    float softmax_scale;
    int left, right;             // position - left <= j <= position + right; negative: no bound
    float softcap;               // 0: none
    const float* alibi_slopes;   // (H,) or (batch, H), or null
    int alibi_stride;            // from one entry's slopes to the next one's: 0 or H
    const float* sinks;          // (H,), or null: one more score of each query, of no key
    const int32_t* key_lengths;  // (B,), or null; clamped to 0 ... Tk
    Dropout dropout;             // rng null: none
    const int32_t* cu_seqlens_q;  // (batch + 1,), or null; clamped to 0 ... total_q
    const int32_t* cu_seqlens_k;  // (batch + 1,), null where cu_seqlens_q is
    int total_q, total_k;         // Tq and Tk without cu_seqlens

    __host__ __device__ bool ragged() const { return cu_seqlens_q != nullptr; }
    __host__ __device__ int entries() const { return ragged() ? 1 : batch; }  // of the tensors
};

struct AttentionFwd {
    AttentionCall call;
    const void* q;  // (B, Tq, H, D)
    const void* k;  // (B, Tk, Hk, D)
    const void* v;  // (B, Tk, Hk, D)
    Strides q_strides, k_strides, v_strides;
    void* out;   // (B, Tq, H, D) contiguous
    float* lse;  // (B, H, Tq)
};

struct AttentionBwd {
    AttentionCall call;
    const void* q;     // (B, Tq, H, D)
    const void* k;     // (B, Tk, Hk, D)
    const void* v;     // (B, Tk, Hk, D)
    const void* dout;  // (B, Tq, H, D)
    Strides q_strides, k_strides, v_strides, dout_strides;
    const void* out;    // (B, Tq, H, D) contiguous
    const float* lse;   // (B, H, Tq)
    const float* dlse;  // (B, H, Tq), or null
    // Workspaces of the sizes that attention_bwd_workspaces returns; null where the size is 0.
    float* delta;        // (B, H, Tq)
    float* total;        // (B, H, Tq)
    float* dq_sum;       // tiles of dq, where several blocks of keys add to it
    bool deterministic;  // dq is summed in a fixed order
    float* row_stats;    // row_stats and turns are workspaces of the Hopper kernels alone
    int* turns;
    void* dq;  // (B, Tq, H, D) contiguous, or null: not wanted
    void* dk;  // (B, Tk, Hk, D) contiguous, or null
    void* dv;  // (B, Tk, Hk, D) contiguous, or null
    float* by_query;  // (B, H, Tq), or null: see attention/bwd/queries.h
};

// The builds of the Hopper kernels, by number. A launcher's `build` is such a number, or kRule,
// which lets the rule choose. The launcher throws Error with the reason where the build cannot take
// the problem.
std::vector<Build> attention_fwd_builds();
std::vector<Build> attention_bwd_builds();

void launch_attention_fwd(DType dtype, const AttentionFwd& p, int build, Stream stream);
void launch_attention_bwd(DType dtype, const AttentionBwd& p, int build, Stream stream);

// The number of elements of each workspace of the backward pass, 0 where it is not needed. The
// functions read every member of the params but the workspaces. The second function is for the
// Hopper kernels alone.
struct BwdWorkspaces {
    int64_t delta, total, dq_sum, row_stats, turns;
};
BwdWorkspaces attention_bwd_workspaces(DType dtype, const AttentionBwd& p, int build,
                                       Stream stream);
BwdWorkspaces attention_bwd_sm90_workspaces(DType dtype, const AttentionBwd& p, int build,
                                            Stream stream);

}  // namespace gk
