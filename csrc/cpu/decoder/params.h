// The blocks of a GPT on the newest tokens of each text in a cache, on a CPU: one call instead of
// some ten a block. It runs the launchers of the ops one after another, as the layers do
// (gptkernels/nn/layers.py), so results have the same bits.
//
// Bytes (the floor): the weights and the keys and values that the tokens see, read once.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/dtype.h"

namespace gk::cpu {

// All tensors have one dtype.
struct Norm {
    const void *weight, *bias;  // (C,); bias may be null
    float eps;
};
struct Weights {
    const void* weight;  // (N, K), rows `stride` elements apart
    const void* bias;    // (N,), or null
    int64_t stride;
};

struct DecoderBlock {
    Norm ln_1, ln_2;
    Weights c_attn, c_proj;    // ((H + 2 Hk) D, C), (C, H D)
    Weights c_fc, mlp_c_proj;  // (F, C), (C, F)
    void *k, *v;               // the cache: (R, Tmax, Hk, D), contiguous
    int64_t F, left;           // left: of the attention's window; negative: no bound
    bool tanh;                 // which GELU
};

// T new tokens of each of R texts, R T <= kMostRows.
struct DecoderStep {
    const void* x;               // (R, T, C)
    void* y;                     // (R, T, C): the head's input
    const int64_t* positions;    // (R, T): where in the cache the tokens go, below Tmax
    const int32_t* key_lengths;  // (R,): how many keys the last one of them sees
    int64_t R, T, Tmax, C, H, Hk, D;
    float softmax_scale;
    bool pre_norm;  // GPT-2's blocks, which ln_f follows, or GPT-1's
    Norm ln_f;
    DType dtype;
};

// Every size is at least 1, D is at most kDecodeWidth. `threads`: the most that run.
void decoder_step(const DecoderStep& p, const std::vector<DecoderBlock>& blocks, int threads);

}  // namespace gk::cpu
