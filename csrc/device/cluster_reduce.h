// Sums across a cluster: every thread of all its CTAs receives the same bits, and the order of the
// addends never changes.
#pragma once

#include "device/cluster.h"
#include "device/reduce.h"

namespace gk {

__device__ __forceinline__ float added(float a, float b) { return a + b; }
__device__ __forceinline__ float2 added(float2 a, float2 b) {
    return make_float2(a.x + b.x, a.y + b.y);
}

// Every warp writes its sum into the shared memory of each CTA. So one barrier of the cluster is
// enough (reducing within each CTA first would take two more), and after it a CTA reads only its
// own memory. No CTA accesses another one after that barrier, so a CTA may return. Before the call
// every CTA must be known to run: call cluster_sync() once. V: float or float2. scratch: shared
// memory, one V for each warp of the cluster. Two sums in a row need two scratches; the third may
// use the first scratch again.
template <class V>
__device__ __forceinline__ V cluster_sum(V value, unsigned ctas, V* scratch) {
    value = warp_sum(value);
    const unsigned warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane < ctas) *cluster_map(scratch + cluster_rank() * warps + warp, lane) = value;
    cluster_sync();
    V total{};
    for (unsigned i = lane; i < ctas * warps; i += 32) total = added(total, scratch[i]);
    return warp_sum(total);
}

}  // namespace gk
