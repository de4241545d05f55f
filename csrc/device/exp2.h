// 2^x for softmax. fp32 gets full precision. Where results are rounded to 16 bits anyway, the
// hardware's own instruction is used (off by about two units in the last place, PTX ISA "ex2").
#pragma once

#include "runtime/launch.h"

namespace gk {

// One instruction; a result that would be denormal is 0.
__device__ __forceinline__ float exp2_flushed(float x) {
#ifdef GK_EMULATE
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// T is the dtype of the result that the weights are summed into. 0 for -inf, NaN for NaN.
template <class T>
__device__ __forceinline__ float exp2_for(float x) {
    return sizeof(T) == 2 ? exp2_flushed(x) : exp2f(x);
}

}  // namespace gk
