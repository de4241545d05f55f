// Attention forward on Hopper: from a block's products to its weights, in registers (the kernel is
// in attention/fwd/sm90/kernel.h).
//
// A thread holds accumulators of m64nNk16 (device/wgmma.h): the columns j, j + 1, j + 8, j + 9, ...
// of the rows i and i + 8, where i and j are its first row and column.
#pragma once

#include "attention/scores.h"
#include "device/exp2.h"

namespace gk {

template <int kTiles>
__device__ __forceinline__ void rescale_rows(float (&o)[kTiles][4], const float (&by)[2]) {
#pragma unroll
    for (int d = 0; d < kTiles; ++d)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[d][e] *= by[e / 2];
}

// A thread's two rows: the maximum of their scores before the factor is applied, and the sum of
// their weights. Until the end the sum covers only the thread's own columns.
struct FwdSm90Rows {
    float m[2], l[2];
};

// s becomes p = exp2(factor (s - m')). The rows take the new maximum m', and the caller has to
// multiply o by `rescale`. Without kMasked the maximum of a row is finite, unless the row holds NaN
// or Inf.
template <class T, bool kFirst, bool kMasked, int kTiles>
__device__ __forceinline__ void softmax_block(float (&s)[kTiles][4], FwdSm90Rows& rows,
                                              float (&rescale)[2], float factor) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float highest = fmaxf(s[0][2 * half], s[0][2 * half + 1]);
#pragma unroll
        for (int n = 1; n < kTiles; ++n)
            highest = fmaxf(highest, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        if (!kFirst) highest = fmaxf(highest, rows.m[half]);
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
        // A row that has met no key yet subtracts 0, so that its weights are exp2(-inf) = 0.
        const float used = kMasked && highest == -INFINITY ? 0.0f : highest;
        rescale[half] = kFirst ? 1.0f : exp2_for<T>((rows.m[half] - used) * factor);
        rows.m[half] = highest;
        const float shift = -used * factor;
        float sums[2] = {0, 0};
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const float p = exp2_for<T>(fmaf(s[n][2 * half + c], factor, shift));
                s[n][2 * half + c] = p;
                sums[c] += p;
            }
        const float sum = sums[0] + sums[1];
        rows.l[half] = kFirst ? sum : fmaf(rows.l[half], rescale[half], sum);
    }
}

// tanh to about a unit in the last place of 1, without the branch that tanhf takes for each score.
// Numbers near 0 use the series, because 1 - 2 / (exp(2x) + 1) is not precise there relative to x.
template <class T>
__device__ __forceinline__ float tanh_of_score(float x) {
    const float square = x * x;
    const float series = fmaf(fmaf(fmaf(-17.0f / 315, square, 2.0f / 15), square, -1.0f / 3),
                              square, 1.0f) * x;
    const float far = 1 - __fdividef(2, exp2_for<T>(2 * kLog2e * x) + 1);
    return square < 0.04f ? series : far;
}

// Applies softcap and ALiBi.
template <class T, int kTiles>
__device__ __forceinline__ void apply_options(float (&s)[kTiles][4], const Score& score,
                                              const Band& band, int i, int j) {
    if (score.softcap != 0) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                s[n][e] = score.softcap * tanh_of_score<T>(s[n][e] * score.scale);
    } else {
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) s[n][e] *= score.scale;
    }
    if (score.slope != 0) {
        const float distance = static_cast<float>(i + band.shift - j);
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                s[n][e] = fmaf(-score.slope,
                               fabsf(distance + static_cast<float>(e / 2 * 8 - 8 * n - e % 2)),
                               s[n][e]);
    }
}

// Sets the scores of keys that a row does not see to -inf.
template <int kTiles>
__device__ __forceinline__ void apply_mask(float (&s)[kTiles][4], const Band& band, int i, int j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int lowest = band.lowest(i + 8 * half) - j, highest = band.highest(i + 8 * half) - j;
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int col = 8 * n + c;
                if (col < lowest || col > highest) s[n][2 * half + c] = -INFINITY;
            }
    }
}

}  // namespace gk
