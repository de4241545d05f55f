// The builds of linear_cross_entropy's kernels for Hopper: those of the GELU MLP's products that
// the rule chooses among, with the same numbers.
#pragma once

#include <span>

#include "gelu_mlp/sm90/tiles.h"
#include "linear_cross_entropy/params.h"

namespace gk {

constexpr auto kLogitsBuilds = std::span(kProductBuilds).first<3>();
static_assert(kLogitsBuilds.back().rule == Rule::always &&
                  kProductBuilds[kLogitsBuilds.size()].rule == Rule::never,
              "those of the rule come first");

// The map by which the gradients of the logits leave.
inline TensorMapShape dlogits_shape(DType dtype, const LogitGradients& p) {
    return {dtype, 2, p.dlogits, {p.logits.classes, p.logits.rows}, {1, p.dlogits_stride},
            {kUnitCols, kUnitRows}, Swizzle::b128};
}

// Params: LossPartials or LogitGradients. Each is compiled in a translation unit of its own.
template <class Params>
void launch_logits_sm90(DType dtype, const Params& p, const ProductChoice& choice, Stream stream);

}  // namespace gk
