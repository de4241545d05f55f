// The cross-entropy of rows of logits, and its gradient in their place:
// gptkernels.linear_cross_entropy between its products.
//
//     l = logits, or softcap tanh(logits / softcap);  lse = log sum over the row of exp(l)
//     loss = lse - (1 - smoothing) l[target] - smoothing mean(l) + z_loss lse^2
//     dlogits = dloss (p (1 + 2 z_loss lse) - smoothing / cols - (1 - smoothing) [target])
//                     (1 - (l / softcap)^2),  p = exp(l - max l) / sum over the row of exp(l - max l)
//
// p is not exp(l - lse): of large logits lse has lost digits. A backward pass computes the sum again.
//
// A row is read from memory once and, for the gradient, written once: between the passes over it,
// for the maximum, the sum and the gradient, it stays in the cache. Sums are in fp32, and in fp64
// over the parts of a row.
#pragma once

#include "cpu/dtype.h"

namespace gk::cpu {

struct CrossEntropy {
    void* logits;            // (rows, cols), rows `stride` apart; their gradients take their place
    const int64_t* targets;  // (rows,)
    const float* dloss;      // (rows,), or null: no gradient
    float* losses;           // (rows,), or null
    float* lse;              // (rows,), or null
    int64_t rows, cols, stride;
    int64_t ignore_index;  // a row with this target has loss 0 and no gradient
    float smoothing, z_loss, softcap;  // softcap 0: none
    DType dtype;
};

// The weight's gradient of one chunk of rows after the other: sum = part, then sum += part; the last
// goes to `out`, rounded, and not to the sum.
struct Accumulate {
    float* sum;        // (count,)
    const void* part;  // (count,)
    void* out;         // (count,), or null: it is not the last
    int64_t count;
    bool first;
    DType dtype;  // of part and out
};

// `threads`: the most that run.
void cross_entropy(const CrossEntropy& p, int threads);
void accumulate(const Accumulate& p, int threads);

}  // namespace gk::cpu
