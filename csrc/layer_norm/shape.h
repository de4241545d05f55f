// What LayerNorm's launchers ask of a problem, and how its kernels hold a row: in groups of eight
// columns, which are one 16-byte access in a 16-bit dtype, two in fp32, and one Philox call.
//
// Rows are `aligned` when every pointer and row stride is a multiple of eight elements and 16
// bytes, and so is the row's length. All other rows are read and written element by element.
#pragma once

#include <cstdint>
#include <limits>
#include <string>

#include "layer_norm/params.h"

namespace gk {

constexpr int kGroup = 8;

// For errors.
inline std::string shape_of(int64_t rows, int cols, DType x_dtype) {
    const char* dtype = x_dtype == DType::f32 ? "fp32" : x_dtype == DType::bf16 ? "bf16" : "fp16";
    return "x (" + std::to_string(rows) + ", " + std::to_string(cols) + ") " + dtype;
}

template <class A, class B>
constexpr A divide_up(A a, B b) {
    return static_cast<A>((a + b - 1) / b);
}

// A grid of so many CTAs. Throws Error for more than a launch can have.
inline dim3 grid_of(int64_t ctas, const Launch& launch) {
    if (ctas > std::numeric_limits<int32_t>::max())
        throw Error(std::string(launch.name) + " on " + launch.shape + " needs " +
                    std::to_string(ctas) + " CTAs, and a launch has at most 2**31 - 1");
    return dim3(static_cast<unsigned>(ctas));
}

// A number to divide by, and 1 over it: prepared once on the host, where a division on the device
// takes ten instructions and a path for special values.
struct Divisor {
    float value, inverse;

    explicit Divisor(int of) : value(static_cast<float>(of)), inverse(1.0f / value) {}
};

// Groups of a lane if one warp had the whole row.
inline int lane_groups(int cols) { return divide_up(cols, kGroup * 32); }

// Null is as aligned as anything.
inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }
inline bool aligned(int64_t elements) { return elements % kGroup == 0; }

inline bool is_aligned(const LayerNormFwd& op) {
    return aligned(op.cols) && aligned(op.x) && aligned(op.x_stride) && aligned(op.residual) &&
           aligned(op.residual_stride) && aligned(op.weight) && aligned(op.bias) &&
           aligned(op.y) && aligned(op.sum);
}

inline bool is_aligned(const LayerNormBwd& op) {
    return aligned(op.cols) && aligned(op.dy) && aligned(op.dsum) && aligned(op.sum) &&
           aligned(op.sum_stride) && aligned(op.weight) && aligned(op.dx) &&
           aligned(op.dresidual) && aligned(op.partial_dweight) && aligned(op.partial_dbias);
}

}  // namespace gk
