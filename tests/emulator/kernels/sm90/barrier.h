// Shared memory of kernels with one mbarrier, which lies after the box that they take.
#pragma once

#include "../cases.h"
#include "device/mbarrier.h"

inline __device__ uint64_t* barrier_of(const Case& p) {
    return reinterpret_cast<uint64_t*>(gk::shared_memory() + p.bytes);
}

// By the first thread; a barrier of those that use it is to follow.
inline __device__ void make_barrier(uint64_t* bar, unsigned arrivals = 1) {
    if (threadIdx.x == 0) {
        gk::mbarrier_init(bar, arrivals);
        gk::mbarrier_init_fence();
    }
}
