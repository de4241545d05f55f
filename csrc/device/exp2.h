// 2^x as softmax wants it: at full precision for fp32, by the hardware's own instruction (about two
// units in the last place, PTX ISA "ex2") where results are rounded to 16 bits anyway.
#pragma once

#include "launch.h"

namespace gk {

// T is the dtype of the result that the weights end up in. 0 for -inf, NaN for NaN.
template <class T>
__device__ __forceinline__ float exp2_for(float x) {
#ifndef GK_EMULATE
    if constexpr (sizeof(T) == 2) {
        float y;
        asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
        return y;
    }
#endif
    return exp2f(x);
}

}  // namespace gk
