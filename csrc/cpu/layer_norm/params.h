// LayerNorm with dropout and residual, on a CPU. The formulas are those of
// csrc/layer_norm/params.h.
//
// Bytes (the floor): forward reads x and the residual and writes s and y; backward reads dy, dsum
// and s, and writes dx (and dresidual, where dropout or a dtype makes it differ). What a row needs
// twice stays in the cache. Saved for backward: s (x itself where s is x), mean and rstd in fp32.
#pragma once

#include "cpu/dropout/params.h"
#include "cpu/dtype.h"

namespace gk::cpu {

// Matrices are (rows, cols) with a unit stride between columns. They are contiguous unless a row
// stride, in elements, is given.
struct LayerNormFwd {
    const void* x;         // (rows, cols), x_dtype
    const void* residual;  // (rows, cols), residual_dtype; or null
    const void* weight;    // (cols,), weight_dtype
    const void* bias;      // (cols,), weight_dtype; or null
    void* y;               // (rows, cols), x_dtype
    void* sum;             // (rows, cols), sum_dtype; or null: s is x; or y, where s is not kept
    float* mean;           // (rows,); or null
    float* rstd;           // (rows,); or null
    int64_t rows, cols, x_stride, residual_stride;
    float eps;
    Dropout dropout;
    DType x_dtype, residual_dtype, weight_dtype, sum_dtype;
};

struct LayerNormBwd {
    const void* dy;      // (rows, cols), x_dtype
    const void* dsum;    // (rows, cols), sum_dtype; or null
    const void* sum;     // (rows, cols), sum_dtype
    const float* mean;   // (rows,)
    const float* rstd;   // (rows,)
    const void* weight;  // (cols,), weight_dtype
    void* dx;            // (rows, cols), x_dtype
    void* dresidual;     // (rows, cols), residual_dtype; or null: dx takes its place
    void* dweight;       // (cols,), weight_dtype; or null
    void* dbias;         // (cols,), weight_dtype; or null
    int64_t rows, cols, sum_stride;
    Dropout dropout;
    DType x_dtype, residual_dtype, weight_dtype, sum_dtype;
};

// rows and cols are at least 1. `threads`: the most that run.
void layer_norm_fwd(const LayerNormFwd& p, int threads);
void layer_norm_bwd(const LayerNormBwd& p, int threads);

}  // namespace gk::cpu
