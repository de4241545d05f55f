// A linear layer and the cross-entropy of its outputs, without these in memory: parameters and
// launchers.
//
//     l = x weight^T + bias (N, V), or softcap tanh(l / softcap) of it;   lse = log sum_v exp(l)
//     loss = lse - (1 - smoothing) l[target] - smoothing mean(l) + z_loss lse^2
//     dl = dloss (exp(l - lse) (1 + 2 z_loss lse) - smoothing / V - (1 - smoothing) [v = target]),
//          times 1 - tanh^2 with a softcap;   dweight = dl^T x, dx = dl weight, dbias = sum_n dl
//
// x, weight, bias and dl have the launcher's dtype; losses, lse and all that is summed are fp32,
// and so are the logits, which no memory ever holds. No size is 0.
//
// A row whose target is `ignore_index` does not count: its loss is 0. One with a target that is no
// class has loss NaN. Neither has a gradient, whatever dloss is.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/build.h"
#include "runtime/launch.h"
#include "runtime/shape.h"

namespace gk {

// The product that gives the logits of some classes. The last dimension is contiguous.
struct Logits {
    const void* x;           // (rows, width), rows x_stride elements apart
    const void* weight;      // (classes, width), rows weight_stride elements apart
    const void* bias;        // (classes,) or null
    const int64_t* targets;  // (rows,)
    int64_t rows, classes, width;
    int64_t x_stride, weight_stride;
    float softcap;           // 0: none
};

// How a loss is made of a row's logits.
struct LossOptions {
    int64_t ignore_index;
    float label_smoothing, z_loss;
};

// Forward: what each tile of classes adds to the losses.
struct LossPartials {
    Logits logits;       // of all classes
    float* highest;      // (tiles, rows): the largest logit of the tile's
    float* exponential;  // (tiles, rows): the sum of exp(l - highest)
    float* sum;          // (tiles, rows): the sum of l, or null
    float* at_target;    // (rows,): the target's logit; anything where the target is no class
};

// Puts them together.
struct LossSums {
    const int64_t* targets;    // (rows,)
    const float* highest;      // (tiles, rows)
    const float* exponential;  // (tiles, rows)
    const float* sum;          // (tiles, rows); null without label smoothing
    const float* at_target;    // (rows,)
    float* losses;             // (rows,)
    float* lse;                // (rows,)
    int64_t rows, classes;
    int64_t tiles;
    LossOptions options;
};

// Backward: the gradients of the logits of a block of classes.
struct LogitGradients {
    Logits logits;       // of the block
    const float* lse;    // (rows,)
    const float* dloss;  // (rows,)
    void* dlogits;       // (rows, classes of the block), rows dlogits_stride elements apart
    int64_t dlogits_stride;
    int64_t first;       // the number of the block's first class
    int64_t all;         // how many classes there are in all blocks
    LossOptions options;
};

// The shape of the product, for error messages.
inline std::string shape_of(const Logits& p) {
    return shape_of(p.rows, p.width) + " times " + shape_of(p.width, p.classes);
}

// The builds of Hopper's kernels, by number: the first of gelu_mlp_builds(), with the same tiles.
std::vector<Build> linear_cross_entropy_builds();

// build: a number, or kRule. They throw Error with the reason where a build cannot compute the
// product. The number of tiles is that of the first dimension of LossPartials' tensors, whose
// addresses it does not read.
int64_t linear_cross_entropy_tiles(DType dtype, const LossPartials& p, int build, Stream stream);
void launch_linear_cross_entropy_partials(DType dtype, const LossPartials& p, int build,
                                          Stream stream);
void launch_linear_cross_entropy_losses(const LossSums& p, Stream stream);
void launch_linear_cross_entropy_dlogits(DType dtype, const LogitGradients& p, int build,
                                         Stream stream);

}  // namespace gk
