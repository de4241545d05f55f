// Asynchronous copies from global to shared memory (PTX ISA, "cp.async" and "cp.async.wait_group").
//
// A copy belongs to the group that the thread's next cp_async_commit closes. cp_async_wait<N>
// returns when all but the thread's N newest groups have arrived; other threads see the data after
// a barrier.
#pragma once

#include "runtime/launch.h"

#ifdef GK_EMULATE
#include "emulator/async/cp_async.h"
#endif

namespace gk {

// Writes 16 bytes to `shared`: `bytes` (0 ... 16) of them from `global`, then zeros. Both addresses
// are 16-byte aligned. kByL1 keeps the data in L1 too. It helps if a warp's copies leave gaps that
// its next copies fill, since at least 32 bytes are fetched each time.
template <bool kByL1 = false>
__device__ inline void cp_async_16(void* shared, const void* global, int bytes) {
#ifdef GK_EMULATE
    emulator::cp_async_16(shared, global, bytes);
#else
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    if constexpr (kByL1)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;\n" ::"r"(to),
                     "l"(__cvta_generic_to_global(global)), "r"(bytes)
                     : "memory");
    else
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to),
                     "l"(__cvta_generic_to_global(global)), "r"(bytes)
                     : "memory");
#endif
}

__device__ inline void cp_async_commit() {
#ifdef GK_EMULATE
    emulator::cp_async_commit();
#else
    asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

template <int kPending>
__device__ inline void cp_async_wait() {
#ifdef GK_EMULATE
    emulator::cp_async_wait(kPending);
#else
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#endif
}

}  // namespace gk
