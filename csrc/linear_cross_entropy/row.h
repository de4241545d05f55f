// What happens to a row's logits, in every kernel that computes them: one definition, in fp32, so
// that the backward pass sees the forward pass's logits.
#pragma once

#include <cmath>

#include "device/exp2.h"
#include "device/vector.h"
#include "linear_cross_entropy/params.h"

namespace gk {

// e^x; T is the dtype of the layer.
template <class T>
__device__ __forceinline__ float exp_for(float x) {
    if constexpr (sizeof(T) == 2) return exp2_flushed(x * 1.4426950408889634f);
    return expf(x);
}

// tanh(x). Where products are of 16 bits, an error of one rounding of 1 is small, whatever x is;
// tanhf takes so many registers that a kernel that does many at once would spill.
template <class T>
__device__ __forceinline__ float tanh_for(float x) {
    if constexpr (sizeof(T) == 2) return 1.0f - __fdividef(2.0f, 1.0f + exp_for<T>(2.0f * x));
    return tanhf(x);
}

// A sum of exponentials is kept as exp(l - shift), so that it does not overflow. An infinite logit
// shifts nothing: inf - inf is NaN, and the sum shall be infinite, or 0.
__device__ __forceinline__ float shift_of(float highest) {
    return fabsf(highest) == INFINITY ? 0.0f : highest;
}

// sum exp(l) = exponential e^shift_of(highest) over some logits, of which `highest` is the largest.
// Where one is NaN, `exponential` is.
struct ExpSum {
    float highest = -INFINITY, exponential = 0.0f;

    // What is empty, or has logits of -inf alone, is 0 (or NaN) whatever the shift.
    __device__ __forceinline__ float shifted_by(float shift) const {
        return highest == -INFINITY ? exponential : exponential * expf(highest - shift);
    }

    __device__ __forceinline__ void add(const ExpSum& other) {
        const float largest = max(highest, other.highest), shift = shift_of(largest);
        exponential = shifted_by(shift) + other.shifted_by(shift);
        highest = largest;
    }
};

// The largest, or the sum, of the values of kLanes neighbouring lanes, which share a row.
template <int kLanes>
__device__ __forceinline__ float max_of_lanes(float value) {
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
        value = max(value, __shfl_xor_sync(0xffffffffu, value, lanes));
    return value;
}
template <int kLanes>
__device__ __forceinline__ float sum_of_lanes(float value) {
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, lanes);
    return value;
}

// Whether a row counts and has a target that is a class.
__device__ __forceinline__ bool has_gradient(int64_t target, int64_t classes,
                                             const LossOptions& options) {
    return target != options.ignore_index && target >= 0 && target < classes;
}

// The gradient of a row's logits.
template <class T>
struct RowGradient {
    float lse, dloss, even, one;  // even: what label smoothing takes from each class
    float factor;                 // of the probabilities
    int64_t target;               // counted from the block's first class
    bool alive;

    __device__ __forceinline__ RowGradient(const LogitGradients& p, int64_t row) {
        lse = p.lse[row];
        dloss = p.dloss[row];
        even = p.options.label_smoothing / static_cast<float>(p.all);
        one = 1.0f - p.options.label_smoothing;
        factor = p.options.z_loss == 0.0f ? 1.0f : 1.0f + 2.0f * p.options.z_loss * lse;
        const int64_t found = p.logits.targets[row];
        target = found - p.first;
        alive = has_gradient(found, p.all, p.options);
    }

    // Of the logit l, whose derivative by that before the softcap is `slope`.
    __device__ __forceinline__ float operator()(float l, float slope, bool is_target) const {
        float d = exp_for<T>(l - lse) * factor - even;
        if (is_target) d -= one;
        // dloss may be infinite in rows that do not count.
        return alive ? d * slope * dloss : 0.0f;
    }
};

// A logit behind a softcap, and its derivative by that before it.
template <class T>
struct Softcap {
    float cap, inverse;

    __device__ __forceinline__ explicit Softcap(float softcap)
        : cap(softcap), inverse(1.0f / softcap) {}

    __device__ __forceinline__ float operator()(float l, float& slope) const {
        const float t = tanh_for<T>(l * inverse);
        slope = 1.0f - t * t;
        return cap * t;
    }
};

}  // namespace gk
