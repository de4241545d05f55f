// The dtypes of tensors, as the Python side numbers them, and their elements.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace gk::cpu {

enum class DType : int32_t { float32, bfloat16, float16 };

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

inline constexpr size_t kBytes[] = {4, 2, 2};

inline size_t bytes_of(DType dtype) { return kBytes[static_cast<int>(dtype)]; }

}  // namespace gk::cpu
