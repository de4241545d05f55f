// Attention's parameters, forward and backward, as the launchers take them.
//
//     s = scale q.k;   s = softcap tanh(s / softcap);   s -= slope |i + Tk - Tq - j|;   masks
//     out = dropout(softmax(s)) v                       lse = log sum_j exp(s)
//
// dtype is that of q, k, v, out and their gradients; everything else is fp32. Sizes are at least 1,
// D at most 256, H a multiple of Hk. Query head h reads key head h / (H / Hk).
#pragma once

#include <cstdint>

#include "dropout.h"
#include "launch.h"

namespace gk {

constexpr int kMaxHeadWidth = 256;

// Elements from one batch entry, token or head to the next; the last dimension has stride 1.
struct Strides {
    int64_t batch, token, head;
};

// What both directions need to know.
struct AttentionCall {
    int batch, Tq, Tk, H, Hk, D;
    float scale;
    int left, right;             // position - left <= j <= position + right; negative: no bound
    float softcap;               // 0: none
    const float* alibi_slopes;   // (H,), or null
    const int32_t* key_lengths;  // (B,), or null; clamped to 0 ... Tk
    Dropout dropout;             // rng null: none
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
    float* dq_sum;      // (B, Tq, H, D) fp32, zeroed, where dq is added up by atomics; else null
    void* dq;           // (B, Tq, H, D) contiguous, or null: not wanted
    void* dk;           // (B, Tk, Hk, D) contiguous, or null together with dv
    void* dv;           // (B, Tk, Hk, D) contiguous
};

void launch_attention_fwd(DType dtype, const AttentionFwd& p, Stream stream);
void launch_attention_bwd(DType dtype, const AttentionBwd& p, Stream stream);

}  // namespace gk
