// What attention's Hopper kernels share, forward and backward: which calls they take, and how the
// tensor memory accelerator sees their tensors.
#pragma once

#include <string>

#include "attention/shape.h"
#include "runtime/tensor_map.h"

namespace gk {

// A tensor (B, T, H, D) as boxes of `rows` tokens of one head, one panel of a SwizzledTile
// (device/swizzled.h) wide: 64 columns, or 32. The part of a box past the last token or column is
// loaded as zeros and is not stored.
inline TensorMapShape attention_map_shape(DType dtype, const void* base, const Strides& strides,
                                          int batch, int tokens, int heads, int D, int rows,
                                          int panel_cols = 64) {
    return {dtype,
            4,
            base,
            {D, heads, tokens, batch},
            {1, strides.head, strides.token, strides.batch},
            {panel_cols, 1, rows, 1},
            panel_cols == 64 ? Swizzle::b128 : Swizzle::b64};
}

// Returns why no Hopper kernel takes the call, or "" if one may.
inline std::string attention_sm90_refuses_call(DType dtype, const AttentionCall& c) {
    if (dtype == DType::f32) return "fp32 is multiplied in full precision, which wgmma does not do";
    if (c.ragged()) return "its boxes end where a batch entry does, not where a sequence does";
    if (c.dropout.rng != nullptr) return "dropout is drawn in the layout of mma.sync";
    return "";
}

// Returns why the tensor memory accelerator cannot address a tensor, or "" if it can.
inline std::string attention_sm90_refuses_tensor(const char* name, const TensorMapShape& shape) {
    const char* reason = tensor_map_refuses(shape);
    return reason == nullptr ? "" : std::string(name) + ": " + reason;
}

}  // namespace gk
