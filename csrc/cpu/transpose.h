// The transpose of a square of kWidth x kWidth 32-bit numbers in registers, by Eklundh's algorithm:
// "A Fast Computer Method for Matrix Transposing", 1972.
#pragma once

#include "cpu/vec.h"

namespace gk::cpu::GK_ISA {

#if __has_builtin(__builtin_shufflevector)

template <int... kLane>
struct LaneNumbers {};
#if defined(__AVX512F__)
using AllLanes = LaneNumbers<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif defined(__AVX2__)
using AllLanes = LaneNumbers<0, 1, 2, 3, 4, 5, 6, 7>;
#else
using AllLanes = LaneNumbers<0, 1, 2, 3>;
#endif

// Exchanges the lanes of a whose number has the bit kBit with those of b whose number lacks it.
template <int kBit, int... kLane>
static inline void exchange(Floats& a, Floats& b, LaneNumbers<kLane...>) {
    const Floats first =
        __builtin_shufflevector(a, b, (kLane & kBit ? kWidth + kLane - kBit : kLane)...);
    b = __builtin_shufflevector(a, b, (kLane & kBit ? kWidth + kLane : kLane + kBit)...);
    a = first;
}

template <int kBit>
static inline __attribute__((always_inline)) void transpose_from(Floats (&rows)[kWidth]) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i)
        if ((i & kBit) == 0) exchange<kBit>(rows[i], rows[i + kBit], AllLanes());
    if constexpr (kBit * 2 < kWidth) transpose_from<kBit * 2>(rows);
}

static inline __attribute__((always_inline)) void transpose(Floats (&rows)[kWidth]) {
    transpose_from<1>(rows);
}

#else  // GCC 11

static inline void transpose(Floats (&rows)[kWidth]) {
    for (int i = 0; i < kWidth; ++i)
        for (int j = 0; j < i; ++j) {
            const float kept = rows[i][j];
            rows[i][j] = rows[j][i];
            rows[j][i] = kept;
        }
}

#endif

}  // namespace gk::cpu::GK_ISA
