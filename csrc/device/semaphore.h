// An order between CTAs of one launch, through a counter in global memory that starts at 0 (PTX
// ISA, "Memory Consistency Model"). CTAs are started by rising number: one may wait for those of
// lower number alone, else it may wait for one that its own waiting keeps from starting.
#pragma once

#include "runtime/launch.h"

#ifdef GK_EMULATE
#include "emulator/async/semaphore.h"
#endif

namespace gk {

// One thread waits until *flag is `value`. What the thread, and after a barrier its CTA, does then,
// bulk copies and reductions too, comes after what the others did before they released.
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

// One thread, after a barrier with those who worked, and after bulk_wait<0>() for its bulk copies.
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
