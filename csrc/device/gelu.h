// GELU and its slope, in fp32.
//
//     tanh:  gelu(h) = h sigmoid(2u), u = sqrt(2/pi) (h + 0.044715 h^3), as 0.5 h (1 + tanh u)
//     erf:   gelu(h) = h Phi(h) = h (0.5 + 0.5 erf(h / sqrt 2))
//
// The fma calls are explicit. Otherwise the compiler might fuse the gate's operations differently
// in two kernels, and an activation that the backward pass computes again must have the forward
// pass's bits. No formula subtracts nearly equal numbers, and no exponential overflows.
#pragma once

#include "runtime/launch.h"
#include "device/exp2.h"

namespace gk {

struct Gelu {
    float gate;  // gelu(h) / h
    float bell;  // the gate's derivative; for tanh: over its factor 1 + 3 * 0.044715 h^2
};

template <bool kTanh>
__device__ __forceinline__ Gelu gelu(float h) {
    if constexpr (kTanh) {
        constexpr float kScale = 0.7978845608028654f, kCubic = 0.044715f;  // sqrt(2/pi)
        constexpr float kTwoLog2E = 2.0f * 1.4426950408889634f;
        const float v = h * fmaf(h * h, kTwoLog2E * kScale * kCubic, kTwoLog2E * kScale);  // of 2^
        const float decay = exp2_flushed(-fabsf(v));
        const float rest = __fdividef(1.0f, 1.0f + decay);
        return {(v < 0.0f ? decay : 1.0f) * rest, (2.0f * kScale) * (decay * rest * rest)};
    } else {
        constexpr float kSqrtHalf = 0.7071067811865476f, kInvSqrt2Pi = 0.3989422804014327f;
        return {fmaf(erff(h * kSqrtHalf), 0.5f, 0.5f), kInvSqrt2Pi * __expf(-0.5f * (h * h))};
    }
}

// gelu'(h). h is first multiplied by the bell, which is exactly 0 wherever a power of h would
// overflow.
template <bool kTanh>
__device__ __forceinline__ float gelu_slope(float h, Gelu gelu) {
    const float q = h * gelu.bell;
    return gelu.gate + (kTanh ? fmaf(3.0f * 0.044715f, h * (h * q), q) : q);
}

}  // namespace gk
