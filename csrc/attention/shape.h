// What attention's launchers ask of a problem: the widths that kernels are compiled for, how rows
// lie in memory, and what to call the problem in errors.
#pragma once

#include <iterator>
#include <string>
#include <type_traits>

#include "attention/params.h"
#include "runtime/shape.h"

namespace gk {

// Kernels are compiled for heads of these widths. A head in between runs in the next wider kernel.
constexpr int kHeadWidths[] = {64, 96, 128, 192, 256};
constexpr int kMaxHeadWidth = 256;

// Calls f(std::integral_constant<int, kWidth>{}), where kWidth is the width of the narrowest kernel
// that takes heads of width D.
template <int kFirst = 0, class F>
auto dispatch_width(int D, F&& f) {
    constexpr int kWidth = kHeadWidths[kFirst];
    if constexpr (kWidth < kMaxHeadWidth) {
        if (D > kWidth) return dispatch_width<kFirst + 1>(D, f);
    }
    return f(std::integral_constant<int, kWidth>{});
}

inline int padded_width(int D) {
    return dispatch_width(D, [](auto width) { return int{width}; });
}

// The strides of a contiguous tensor (batch, tokens, heads, D).
inline Strides contiguous_strides(int tokens, int heads, int D) {
    return {static_cast<int64_t>(tokens) * heads * D, static_cast<int64_t>(heads) * D, D};
}

// Whether every row of a head starts at a multiple of 16 bytes.
inline bool aligned_rows(const void* address, int64_t element_size, const Strides& strides) {
    return aligned_16(address, strides.batch * element_size, strides.token * element_size,
                      strides.head * element_size);
}

// The shapes of a call, for error messages.
inline std::string shape_of(const AttentionCall& c) {
    const auto text = [](int n) { return std::to_string(n); };
    const char* up_to = c.ragged() ? ", up to " : ", ";  // the longest sequence's Tq, Tk
    return "q (" + text(c.batch) + up_to + text(c.Tq) + ", " + text(c.H) + ", " + text(c.D) +
           "), k (" + text(c.batch) + up_to + text(c.Tk) + ", " + text(c.Hk) + ", " + text(c.D) +
           ")";
}

}  // namespace gk
