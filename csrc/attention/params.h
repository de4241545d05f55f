// Attention's parameters, forward and backward, as the launchers take them.
//
//     s = scale q.k;   s = softcap tanh(s / softcap);   s -= slope |i + Tk - Tq - j|;   masks
//     out = dropout(softmax(s)) v                       lse = log sum_j exp(s)
//
// dtype is that of q, k, v, out and their gradients; everything else is fp32. Sizes are at least 1,
// D at most 256, H a multiple of Hk. Query head h reads key head h / (H / Hk).
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

// What both directions need to know. With cu_seqlens the batch is of sequences that lie end to end:
// tensors are those of one batch entry of total_q and total_k tokens, sequence b has queries
// cu_seqlens_q[b] up to cu_seqlens_q[b + 1], and so for keys. Queries of no sequence, before the
// first or past the last one, give 0 and lse -inf, and like such keys have gradient 0.
struct AttentionCall {
    int batch, Tq, Tk, H, Hk, D;  // Tq, Tk: of each entry, or, for speed, the longest sequence
    float scale;
    int left, right;             // position - left <= j <= position + right; negative: no bound
    float softcap;               // 0: none
    const float* alibi_slopes;   // (H,), or null
    const int32_t* key_lengths;  // (B,), or null; clamped to 0 ... Tk
    Dropout dropout;             // rng null: none
    const int32_t* cu_seqlens_q;  // (batch + 1,), or null; clamped to 0 ... total_q
    const int32_t* cu_seqlens_k;  // (batch + 1,), null where cu_seqlens_q is
    int total_q, total_k;         // without cu_seqlens Tq and Tk

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
    float* delta;       // (B, H, Tq), workspace
    float* total;       // (B, H, Tq), workspace in fp32, else null
    float* dq_sum;      // workspace where dq is to be added up by atomics (16 bits, dk or dv wanted
                        // too), B * H * Tq * D with Tq rounded up to a multiple of 32 and D to 64,
                        // 96, 128, 192 or 256; with cu_seqlens H * (total_q / 32 + batch) * 32 * D;
                        // else null
    bool deterministic;   // of the Hopper kernels alone: dq is summed in one order
    float* row_stats;     // workspaces of the Hopper kernels, null where the generic ones run:
    int* turns;           // attention_bwd_workspaces says how large these and dq_sum then are
    void* dq;           // (B, Tq, H, D) contiguous, or null: not wanted
    void* dk;           // (B, Tk, Hk, D) contiguous, or null
    void* dv;           // (B, Tk, Hk, D) contiguous, or null
};

// The builds of the kernels for Hopper, by number. A launcher's `build` is a number, or kRule. It
// throws Error with the reason where the build cannot take the problem.
std::vector<Build> attention_fwd_builds();
std::vector<Build> attention_bwd_builds();

void launch_attention_fwd(DType dtype, const AttentionFwd& p, int build, Stream stream);
void launch_attention_bwd(DType dtype, const AttentionBwd& p, int build, Stream stream);

// How many elements the workspaces of backward's Hopper kernels have. All are 0 where the kernels
// for any GPU run: the size of their workspace is at `dq_sum` above.
struct BwdWorkspaces {
    int64_t row_stats, dq_sum, turns;
};
BwdWorkspaces attention_bwd_workspaces(DType dtype, const AttentionBwd& p, int build,
                                       Stream stream);

}  // namespace gk
