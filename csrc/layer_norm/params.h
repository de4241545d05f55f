// LayerNorm with dropout and residual.
//
//     s = dropout(x) + residual, rounded to the sum's dtype
//     mean, rstd: of the rounded s, over the columns, in fp32
//     y = (s - mean) * rstd * weight + bias
// backward, with g = dy * weight and x^ = (s - mean) * rstd:
//     ds_total = rstd * (g - mean(g) - x^ * mean(g x^)) + dsum
//     dresidual = ds_total        dx = dropout'(ds_total)
//     dweight = sum over rows of dy x^        dbias = sum over rows of dy
//
// Bytes (the floor): forward reads x, residual and writes y, s; backward reads dy, dsum, s and
// writes dx (and dresidual where dropout or a dtype makes it differ from dx). Saved for backward: s
// (x itself where s is x), mean and rstd in fp32, and the dropout seed, never a mask.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/build.h"
#include "runtime/dropout.h"
#include "runtime/launch.h"

namespace gk {

// Matrices are (rows, cols) with a unit stride between columns. They are contiguous unless a row
// stride, in elements, is given. The sum's dtype is that of x, or fp32; an fp32 residual makes it
// fp32.
struct LayerNormFwd {
    const void* x;         // (rows, cols), x_dtype
    const void* residual;  // (rows, cols), residual_dtype; or null
    const void* weight;    // (cols,), weight_dtype
    const void* bias;      // (cols,), weight_dtype; or null
    void* y;               // (rows, cols), x_dtype
    void* sum;             // (rows, cols), sum_dtype; or null: s is x
    float* mean;           // (rows,)
    float* rstd;           // (rows,)
    int64_t rows, x_stride, residual_stride;
    int cols;
    float eps;
    Dropout dropout;  // rng null: none
    DType x_dtype, residual_dtype, weight_dtype, sum_dtype;
};

struct LayerNormBwd {
    const void* dy;          // (rows, cols), x_dtype
    const void* dsum;        // (rows, cols), sum_dtype; or null
    const void* sum;         // (rows, cols), sum_dtype
    const float* mean;       // (rows,)
    const float* rstd;       // (rows,)
    const void* weight;      // (cols,), weight_dtype
    void* dx;                // (rows, cols), x_dtype
    void* dresidual;         // (rows, cols), residual_dtype; or null: dx takes its place
    float* partial_dweight;  // (partials, cols), workspace; or null: no dweight
    float* partial_dbias;    // (partials, cols), workspace; or null: no dbias
    void* dweight;           // (cols,), weight_dtype; or null
    void* dbias;             // (cols,), weight_dtype; or null
    int64_t rows, sum_stride;
    int cols, partials;  // partials: what layer_norm_bwd_partials returns
    Dropout dropout;     // rng null: none
    DType x_dtype, residual_dtype, weight_dtype, sum_dtype;
};

// The builds, by number: clusters of CTAs, each of which takes a part of a row (compute capability
// 9.0). `threads` is the most that a CTA has, and `tile_n` the number of columns that they hold.
std::vector<Build> layer_norm_fwd_builds();
std::vector<Build> layer_norm_bwd_builds();

// rows and cols are at least 1. build: a number, or kRule: then a cluster takes a row where it is
// predicted to win, and otherwise the kernels for any GPU run. The launchers throw Error for dtypes
// that the sum cannot have, and where the build cannot take the problem.
void launch_layer_norm_fwd(const LayerNormFwd& p, int build, Stream stream);
void launch_layer_norm_bwd(const LayerNormBwd& p, int build, Stream stream);

// How many CTAs, or clusters, share the rows in the backward pass; its workspaces have this many
// rows. Any other number gives right results too.
int layer_norm_bwd_partials(int64_t rows, int cols, int device, int build);

}  // namespace gk
