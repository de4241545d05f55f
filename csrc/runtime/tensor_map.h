// Tensor maps tell the tensor memory accelerator (device/tma.h) where a tensor lies in global
// memory and what box of it one copy moves. A map is made on the host and travels in the params of
// a kernel, whose parameter is then `const __grid_constant__`: the accelerator reads the map where
// it lies.
#pragma once

#include <cstdint>

#include "runtime/launch.h"

namespace gk {

// The driver requires a multiple of 64; its own type requires 128 since CUDA 13.
struct alignas(128) TensorMap {
    uint64_t opaque[16];
};

// How the 16-byte chunks of each row of a box are exchanged in shared memory, so that eight rows of
// a column lie in different banks: address bits 4-6 ^= bits 7-9 (b128), 4-5 ^= 7-8 (b64), 4 ^= 7
// (b32), where addresses count from a multiple of 1,024, 512 or 256 bytes.
enum class Swizzle : int { none, b32, b64, b128 };

// The innermost dimension comes first. A box may reach past any end of the tensor: there loads give
// zeros, and stores and reductions write nothing.
struct TensorMapShape {
    DType dtype;
    int rank;           // 1 to 5
    const void* base;   // aligned to 16 bytes
    int64_t size[5];
    int64_t stride[5];  // in elements, multiples of 16 bytes; [0] is 1. Ignored where size is 1
    int box[5];         // 1 to 256 each; a row is as long as the span of its swizzle
    Swizzle swizzle;
};

// Returns why a map cannot be made, or nullptr. The function refuses what the driver would refuse,
// without asking the driver. It also refuses rows that are shorter than the span of their swizzle,
// since no document says how these lie in memory.
const char* tensor_map_refuses(const TensorMapShape& shape);

// Throws Error with the reason where the map cannot be made. L2 fetches such a tensor in lines of
// 256 bytes.
TensorMap tensor_map(const TensorMapShape& shape);

namespace detail {

constexpr int kSwizzleSpans[] = {0, 32, 64, 128};  // bytes; none has no span

constexpr int bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// The stride of a dimension, in bytes. A dimension of one element gets a stride that every map may
// have.
constexpr int64_t byte_stride(const TensorMapShape& shape, int dimension) {
    return shape.size[dimension] == 1 ? 16 : shape.stride[dimension] * bytes_of(shape.dtype);
}

// The map of a shape that is not refused, encoded by the driver, or by the emulator for itself.
TensorMap encode(const TensorMapShape& shape);

}  // namespace detail
}  // namespace gk
