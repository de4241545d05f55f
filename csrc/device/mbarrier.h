// Barriers in shared memory that count arrivals and the bytes of asynchronous copies (PTX ISA,
// "mbarrier").
//
// A phase is complete when `count` arrivals have come and all expected bytes have arrived; then the
// next phase begins. mbarrier_wait(bar, parity) returns when the phase of that parity is complete.
// A new barrier is in phase 0, and the phase before it, of parity 1, counts as complete. So
// consumers, which start with parity 0, wait for the first data, and producers, which start with
// parity 1, do not wait. After the wait a thread sees what the others did before they arrived.
//
// One thread initialises the barrier and calls mbarrier_init_fence(). Then all threads meet at
// __syncthreads(), or at cluster_sync() if other CTAs of the cluster arrive or copy too.
#pragma once

#include <cstdint>

#include "device/shared_address.h"
#include "runtime/launch.h"

#ifdef GK_EMULATE
#include "emulator/async/mbarrier.h"
#endif

namespace gk {

__device__ inline void mbarrier_init(uint64_t* bar, unsigned count) {
#ifdef GK_EMULATE
    emulator::mbarrier_init(bar, count);
#else
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(bar)), "r"(count)
                 : "memory");
#endif
}

// After this and a barrier, the cluster and the asynchronous engine see the thread's mbarriers.
__device__ inline void mbarrier_init_fence() {
#ifdef GK_EMULATE
    emulator::mbarrier_init_fence();
#else
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
#endif
}

__device__ inline void mbarrier_arrive(uint64_t* bar) {
#ifdef GK_EMULATE
    emulator::mbarrier_arrive(bar);
#else
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(bar))
                 : "memory");
#endif
}

// Arrives, and makes the phase wait for `bytes` bytes of copies as well.
__device__ inline void mbarrier_arrive_expect_tx(uint64_t* bar, unsigned bytes) {
#ifdef GK_EMULATE
    emulator::mbarrier_arrive_expect_tx(bar, bytes);
#else
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(
                     shared_address(bar)),
                 "r"(bytes)
                 : "memory");
#endif
}

__device__ inline void mbarrier_expect_tx(uint64_t* bar, unsigned bytes) {
#ifdef GK_EMULATE
    emulator::mbarrier_expect_tx(bar, bytes);
#else
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;\n" ::"r"(
                     shared_address(bar)),
                 "r"(bytes)
                 : "memory");
#endif
}

// Arrives at the barrier in the same place of CTA `rank` of the cluster, to say that this thread
// has finished reading there. That CTA must not have returned. The arrival publishes nothing that
// the thread wrote. Publishing would take a release at the cluster's scope, which costs a fence of
// the whole GPU (MEMBAR.GPU in SASS) at each stage, and an acquire that empties L1.
__device__ inline void mbarrier_arrive_cluster(uint64_t* bar, unsigned rank) {
#ifdef GK_EMULATE
    emulator::mbarrier_arrive_cluster(bar, rank);
#else
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}\n" ::"r"(shared_address(bar)),
        "r"(rank)
        : "memory");
#endif
}

__device__ inline void mbarrier_wait(uint64_t* bar, unsigned parity) {
#ifdef GK_EMULATE
    emulator::mbarrier_wait(bar, parity);
#else
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
        "@complete bra done;\n"
        "bra again;\n"
        "done:\n"
        "}\n" ::"r"(shared_address(bar)),
        "r"(parity)
        : "memory");
#endif
}

}  // namespace gk
