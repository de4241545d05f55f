// What LayerNorm's launchers ask of a problem, and how its kernels hold a row: in groups of eight
// columns. A group is one 16-byte access in a 16-bit dtype, two in fp32, and one Philox call.
//
// Rows are `aligned` when every pointer is a multiple of 16 bytes and the row's length and every
// row stride are multiples of eight elements. All other rows are read and written element by
// element.
#pragma once

#include <cstdint>
#include <string>

#include "layer_norm/params.h"
#include "runtime/shape.h"

namespace gk {

constexpr int kGroup = 8;

// The shape and dtype of a problem, for error messages.
inline std::string shape_of(const LayerNormFwd& op) {
    return "x " + shape_of(op.rows, op.cols) + " " + name_of(op.x_dtype);
}
inline std::string shape_of(const LayerNormBwd& op) {
    return "x " + shape_of(op.rows, op.cols) + " " + name_of(op.x_dtype);
}

// A number to divide by, and its reciprocal. The host computes it once, because a division on the
// device takes ten instructions and a path for special values.
struct Divisor {
    float value, inverse;

    explicit Divisor(int of) : value(static_cast<float>(of)), inverse(1.0f / value) {}
};

// How many groups a lane would hold if one warp had the whole row.
inline int lane_groups(int cols) { return divide_up(cols, kGroup * 32); }

// Whether a row's length, or its stride, consists of whole groups.
inline bool in_groups(int64_t elements) { return elements % kGroup == 0; }

inline bool is_aligned(const LayerNormFwd& op) {
    return in_groups(op.cols) && in_groups(op.x_stride) && in_groups(op.residual_stride) &&
           aligned_16(op.x) && aligned_16(op.residual) && aligned_16(op.weight) &&
           aligned_16(op.bias) && aligned_16(op.y) && aligned_16(op.sum);
}

inline bool is_aligned(const LayerNormBwd& op) {
    return in_groups(op.cols) && in_groups(op.sum_stride) && aligned_16(op.dy) &&
           aligned_16(op.dsum) && aligned_16(op.sum) && aligned_16(op.weight) &&
           aligned_16(op.dx) && aligned_16(op.dresidual) && aligned_16(op.partial_dweight) &&
           aligned_16(op.partial_dbias);
}

}  // namespace gk
