// Attention's parameters, forward and backward, as the launchers take them.
//
//     s = scale q.k;   s = softcap tanh(s / softcap);   s -= slope |i + Tk - Tq - j|;   masks
//     out = dropout(softmax(s)) v                       lse = log sum_j exp(s)
//
// dtype is that of q, k, v, out and their gradients; everything else is fp32. Sizes are at least 1,
// D at most 256, H a multiple of Hk. Query head h reads key head h / (H / Hk).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/build.h"
#include "runtime/dropout.h"
#include "runtime/launch.h"

namespace gk {

constexpr int kMaxHeadWidth = 256;

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
    float softmax_scale;
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
    // Workspaces, as large as attention_bwd_workspaces says; null where that is 0.
    float* delta;        // (B, H, Tq)
    float* total;        // (B, H, Tq)
    float* dq_sum;       // tiles of dq, where several blocks of keys add to it
    bool deterministic;  // dq is summed in one order
    float* row_stats;    // workspaces of the Hopper kernels alone
    int* turns;
    void* dq;  // (B, Tq, H, D) contiguous, or null: not wanted
    void* dk;  // (B, Tk, Hk, D) contiguous, or null
    void* dv;  // (B, Tk, Hk, D) contiguous, or null
};

// Whether every row of a head starts at a multiple of 16 bytes.
inline bool aligned_16(const void* address, int64_t element_size, const Strides& strides) {
    const int64_t all = reinterpret_cast<intptr_t>(address) | strides.batch * element_size |
                        strides.token * element_size | strides.head * element_size;
    return all % 16 == 0;
}

// For errors.
inline std::string shape_of(const AttentionCall& c) {
    const auto text = [](int n) { return std::to_string(n); };
    const char* up_to = c.ragged() ? ", up to " : ", ";  // so many tokens a sequence
    return "q (" + text(c.batch) + up_to + text(c.Tq) + ", " + text(c.H) + ", " + text(c.D) +
           "), k (" + text(c.batch) + up_to + text(c.Tk) + ", " + text(c.Hk) + ", " + text(c.D) +
           ")";
}

inline dim3 grid_of(const char* kernel, const AttentionCall& c, int64_t blocks) {
    if (blocks > INT32_MAX)
        throw Error(std::string(kernel) + " on " + shape_of(c) + ": more blocks than a grid takes");
    return dim3(static_cast<unsigned>(blocks));
}

// build: an index into attention_fwd_builds(), ways to build the kernel for compute
// capability 9.0; -1: what the rules choose there, and the kernel of every device elsewhere. Throws
// Error where the build cannot take the call.
void launch_attention_fwd(DType dtype, const AttentionFwd& p, Stream stream, int build = -1);

// Why the kernel for compute capability 9.0 does not take a call, "" if it does.
std::string attention_fwd_sm90_refuses(DType dtype, const AttentionFwd& p);
std::vector<Build> attention_fwd_builds();
void launch_attention_fwd_sm90(DType dtype, const AttentionFwd& p, Stream stream, int build);

// Numbers of elements, 0 where a workspace is not needed.
struct BwdWorkspaces {
    int64_t delta, total, dq_sum, row_stats, turns;
};

// Of everything but the workspaces. Throws Error for a build that cannot take the problem.
BwdWorkspaces attention_bwd_workspaces(DType dtype, const AttentionBwd& p, Stream stream,
                                       int build);

// build: one of attention_bwd_builds, or -1 for the rule's choice.
void launch_attention_bwd(DType dtype, const AttentionBwd& p, Stream stream, int build = -1);

// Attention backward's Hopper kernels: how they are built, and why the generic ones run, "" where
// these do.
std::vector<Build> attention_bwd_builds();
std::string attention_bwd_sm90_refuses(DType dtype, const AttentionBwd& p);

// What these need for themselves; all 0 where the generic ones run. Throws Error as above.
BwdWorkspaces attention_bwd_sm90_workspaces(DType dtype, const AttentionBwd& p, int device,
                                            int build);

}  // namespace gk
