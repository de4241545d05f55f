// A cluster: Launch::cluster neighbouring CTAs that run at the same time, on chips from compute
// capability 9.0, and reach each other's shared memory (PTX ISA, "barrier.cluster" and "mapa").
//
// Another CTA may access this CTA's shared memory from the time it is known to run, which is after
// a first cluster_sync(), until it returns. So the CTAs meet at another cluster_sync() before they
// return.
#pragma once

#include "runtime/launch.h"

#ifdef GK_EMULATE
#include "emulator/fiber/cluster.h"
#endif

namespace gk {

// The number of this CTA in its cluster: blockIdx.x % Launch::cluster.
__device__ inline unsigned cluster_rank() {
#ifdef GK_EMULATE
    return emulator::cluster_rank();
#else
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
    return rank;
#endif
}

// Whole warps call these. Every thread of the cluster arrives, then waits, then may arrive again.
__device__ inline void cluster_arrive() {
#ifdef GK_EMULATE
    emulator::cluster_arrive();
#else
    asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory");
#endif
}

__device__ inline void cluster_wait() {
#ifdef GK_EMULATE
    emulator::cluster_wait();
#else
    asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory");
#endif
}

__device__ inline void cluster_sync() {
#ifdef GK_EMULATE
    emulator::cluster_sync();
#else
    cluster_arrive();
    cluster_wait();
#endif
}

// The address, for plain loads and stores, of the place in CTA `rank`'s shared memory that `mine`
// is in this CTA's.
template <class T>
__device__ inline T* cluster_map(T* mine, unsigned rank) {
#ifdef GK_EMULATE
    return reinterpret_cast<T*>(emulator::cluster_map(mine, rank));
#else
    T* theirs;
    asm volatile("mapa.u64 %0, %1, %2;\n" : "=l"(theirs) : "l"(mine), "r"(rank));
    return theirs;
#endif
}

}  // namespace gk
