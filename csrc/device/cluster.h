// A cluster: Launch::cluster neighbouring CTAs that run at the same time, on chips from compute
// capability 9.0, and reach each other's shared memory (PTX ISA, "barrier.cluster" and "mapa").
//
// Shared memory of a CTA may be touched by the others from when it is known to run, after a first
// cluster_sync(), until it returns: the last one to need it meets it at another.
#pragma once

#include "runtime/launch.h"

#ifdef GK_EMULATE
#include "emulator/fiber/cluster.h"
#endif

namespace gk {

// Of the running CTA: blockIdx.x % Launch::cluster.
__device__ inline unsigned cluster_rank() {
#ifdef GK_EMULATE
    return emulator::cluster_rank();
#else
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
    return rank;
#endif
}

// Whole warps: every thread of the cluster arrives, then waits, by turns.
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

// What lies at `mine` in this CTA's shared memory, in that of CTA `rank`: for plain loads and
// stores.
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
