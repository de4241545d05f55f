// Orders CTAs of one launch through a counter in global memory that starts at 0 (PTX ISA, "Memory
// Consistency Model"). CTAs start in the order of their numbers. So a CTA may wait only for CTAs of
// lower number: a later one might not start until this one ends.
#pragma once

#include "runtime/launch.h"

#ifdef GK_EMULATE
#include "emulator/async/semaphore.h"
#endif

namespace gk {

// One thread waits until *flag is `value`. What this thread does then, and what its CTA does after
// a barrier, comes after what the others did before they released. That includes bulk copies and
// reductions.
__device__ inline void semaphore_wait(const int* flag, int value) {
#ifdef GK_EMULATE
    emulator::semaphore_wait(flag, value);
#else
    int now;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n"
                     : "=r"(now)
                     : "l"(__cvta_generic_to_global(flag))
                     : "memory");
    } while (now != value);
    asm volatile("fence.proxy.async.global;\n" ::: "memory");
#endif
}

// One thread calls this, after a barrier with the threads whose work it announces, and after
// bulk_wait<0>() for its own bulk copies.
__device__ inline void semaphore_release(int* flag, int add) {
#ifdef GK_EMULATE
    emulator::semaphore_release(flag, add);
#else
    asm volatile(
        "fence.proxy.async.global;\n"
        "fence.acq_rel.gpu;\n"
        "red.relaxed.gpu.global.add.s32 [%0], %1;\n" ::"l"(__cvta_generic_to_global(flag)),
        "r"(add)
        : "memory");
#endif
}

}  // namespace gk
