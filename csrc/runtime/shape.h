// What launchers say about a problem in errors, and what they ask of its sizes and addresses.
#pragma once

#include <cstdint>
#include <limits>
#include <string>

#include "runtime/launch.h"

namespace gk {

inline const char* name_of(DType dtype) {
    return dtype == DType::f32 ? "fp32" : dtype == DType::bf16 ? "bf16" : "fp16";
}

inline std::string shape_of(int64_t rows, int64_t cols) {
    return "(" + std::to_string(rows) + ", " + std::to_string(cols) + ")";
}

template <class A, class B>
constexpr A divide_up(A a, B b) {
    return static_cast<A>((a + b - 1) / b);
}

// Whether an address is a multiple of 16, and every address that lies one of the given numbers of
// bytes further too. A null pointer counts as aligned.
template <class... Bytes>
bool aligned_16(const void* address, Bytes... further) {
    return ((reinterpret_cast<intptr_t>(address) | ... | further)) % 16 == 0;
}

// A grid of this many CTAs. Throws Error if a launch cannot have so many.
inline dim3 grid_of(const char* kernel, const std::string& shape, int64_t ctas) {
    if (ctas > std::numeric_limits<int32_t>::max())
        throw Error(std::string(kernel) + " on " + shape + " needs " + std::to_string(ctas) +
                    " CTAs, and a launch has at most 2**31 - 1");
    return dim3(static_cast<unsigned>(ctas));
}

}  // namespace gk
