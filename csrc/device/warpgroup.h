// For CTAs whose warps have different roles: registers that warpgroups pass to each other, and
// barriers between some of the warps (PTX ISA, "setmaxnreg" and "barrier"). A warpgroup is four
// warps, the number of the first of which is a multiple of four.
#pragma once

#include "runtime/launch.h"

#ifdef GK_EMULATE
#include "emulator/fiber/registers.h"
#endif

namespace gk {

// Sets the registers of a thread from here on: a multiple of 8 from 24 to 256. All threads of a
// warpgroup call it. A kernel starts with as many as __launch_bounds__ leaves to each thread. What
// one warpgroup gives back by _dealloc, others may take by _alloc, which waits until enough are
// free.
template <int kRegisters>
__device__ inline void warpgroup_reg_alloc() {
    static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "as setmaxnreg");
#ifdef GK_EMULATE
    emulator::warpgroup_reg_alloc(kRegisters);
#else
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
__device__ inline void warpgroup_reg_dealloc() {
    static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "as setmaxnreg");
#ifdef GK_EMULATE
    emulator::warpgroup_reg_dealloc(kRegisters);
#else
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
#endif
}

// Waits at barrier `id`, 1 to 15 (0 is __syncthreads'), until `threads` threads have come, in whole
// warps. Threads that only arrive count too, and go on at once.
__device__ inline void named_barrier_sync(unsigned id, unsigned threads) {
#ifdef GK_EMULATE
    emulator::barrier_sync(id, threads, "named_barrier_sync");
#else
    asm volatile("barrier.sync.aligned %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
#endif
}

__device__ inline void named_barrier_arrive(unsigned id, unsigned threads) {
#ifdef GK_EMULATE
    emulator::barrier_arrive(id, threads);
#else
    asm volatile("barrier.arrive.aligned %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
#endif
}

}  // namespace gk
