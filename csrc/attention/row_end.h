// The end of a row's softmax in attention's forward kernels.
//
// A sink is one more score of its head in each query's softmax. It belongs to no key: it adds its
// weight to the sum of a row's weights, and nothing to out. So it is added last.
#pragma once

#include "attention/scores.h"
#include "device/exp2.h"

namespace gk {

struct RowEnd {
    float scale;  // out = scale * o; 0 where the row sees no key
    float lse;
};

// m: the maximum of the row's scores in log2 units, l: the sum of its weights exp2(s - m).
template <class T>
__device__ __forceinline__ RowEnd row_end(const AttentionCall& c, int h, float m, float l) {
    // Without sinks -inf, which changes no bit. The larger one of m and the sink has weight 1. The
    // sink is not converted to log2 units and back: a row that sees no key has it as its lse.
    const float sink = c.sinks == nullptr ? -INFINITY : c.sinks[h];
    const float apart = fmaf(sink, kLog2e, -m);
    const float less = sink == -INFINITY ? 0.0f : exp2_for<T>(-fabsf(apart));
    const bool above = apart > 0;
    const float total = above ? fmaf(l, less, 1.0f) : l + less;
    if (total == 0) return {0, -INFINITY};
    return {(above ? less : 1.0f) / total, above ? sink + logf(total) : fmaf(m, kLn2, logf(total))};
}

}  // namespace gk
