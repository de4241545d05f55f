// Sums across the lanes of a warp and across neighbouring warps of a CTA. Every thread receives
// the same bits, and the order of the addends never changes.
#pragma once

#include "runtime/launch.h"

namespace gk {

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, lanes);
    return value;
}

// Two sums at once: their shuffles overlap.
__device__ __forceinline__ float2 warp_sum(float2 value) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        value.x += __shfl_xor_sync(0xffffffffu, value.x, lanes);
        value.y += __shfl_xor_sync(0xffffffffu, value.y, lanes);
    }
    return value;
}

// The sum over a team of up to 32 neighbouring warps. A CTA may have several teams of equal size;
// all of them call this together. V: float or float2. scratch: shared memory, one V for each warp
// of the CTA. The next sum needs another scratch, or a barrier first: a slow warp may still be
// reading this one.
template <class V>
__device__ __forceinline__ V team_sum(V value, int warps_of_team, V* scratch) {
    value = warp_sum(value);
    if (warps_of_team == 1) return value;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) scratch[warp] = value;
    __syncthreads();
    const int first = warp / warps_of_team * warps_of_team;
    return warp_sum(lane < warps_of_team ? scratch[first + lane] : V{});
}

}  // namespace gk
