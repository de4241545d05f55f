// Products by the tensor cores of a warpgroup, four warps of which the first has a number divisible
// by 4, on Hopper alone: D (64 x N, fp32) (+)= A (64 x 16) B (16 x N), asynchronously.
//
// Layouts are those of the PTX ISA, "Matrix Fragments for wgmma.mma_async.m64nNk16". With
// g = lane / 4 and t = lane % 4, warp w of the warpgroup holds rows 16 w + g and 16 w + g + 8 of D
// and A. acc[i] holds what an accumulator of Mma<T> (device/mma.h) would hold of columns 8 i ... 8
// i + 7, and A's registers hold what Mma<T>::A would. So Mma<T>::from_accumulators rounds
// accumulators into A. Descriptors (device/swizzled.h) name operands in shared memory.
//
// The order of calls (PTX ISA, "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group"):
//     fence_proxy_async() (device/tma.h) and a barrier   if threads wrote the operands in shared
//         memory. If TMA wrote them, waiting for its mbarrier is enough.
//     wgmma_fence()         if anything has touched the accumulators or A's registers
//     multiply(...)         several on the same accumulators run in order, if N is the same
//     wgmma_commit()        everything since the last commit becomes a group
//     wgmma_wait<N>()       returns when all but the N newest groups are done: only now may the
//         accumulators be touched and operands be overwritten
//     wgmma_fence_registers(acc)   keeps the compiler, which does not know of the wait, from moving
//         uses of acc before it
// All threads of the warpgroup make each call, with the same descriptors.
#pragma once

#include <cstdint>
#include <type_traits>

#include "runtime/launch.h"

#ifdef GK_EMULATE
#include "emulator/mma/wgmma.h"
#else
#include "device/wgmma_shapes.h"
#endif

namespace gk {

// The direction in which an operand is contiguous in shared memory: along k, or along the rows of A
// or the columns of B (PTX ISA, "Shared Memory Matrix Layout").
enum class Major { k, mn };

__device__ __forceinline__ void wgmma_fence() {
#ifdef GK_EMULATE
    emulator::wgmma_fence();
#else
    asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_commit() {
#ifdef GK_EMULATE
    emulator::wgmma_commit();
#else
    asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#endif
}

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    static_assert(0 <= kPending && kPending <= 7, "groups that may go on");
#ifdef GK_EMULATE
    emulator::wgmma_wait(kPending);
#else
    asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
#endif
}

// The compiler moves no access to the registers across this. It believes that an accumulator has
// its sum as soon as `multiply` is issued, so it might read it before the wait. No instruction is
// made.
template <int kTiles>
__device__ __forceinline__ void wgmma_fence_registers(float (&acc)[kTiles][4]) {
#ifdef GK_EMULATE
    (void)acc;
#else
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(acc[i][j])::"memory");
    }
#endif
}

// N: multiples of 16 up to 256.
template <class T, int N, Major kA = Major::k, Major kB = Major::k>
struct Wgmma {
    static constexpr int M = 64, K = 16;
    static constexpr bool kBf16 = std::is_same<T, __nv_bfloat16>::value;
    static_assert(kBf16 || std::is_same<T, __half>::value, "bf16 or fp16");
    static_assert(N % 16 == 0 && 16 <= N && N <= 256, "a multiple of 16, up to 256");

    // `accumulate`: add to what the accumulators hold, else start from 0; the same in all threads.
    __device__ __forceinline__ static void multiply(float (&acc)[N / 8][4], uint64_t a, uint64_t b,
                                                    bool accumulate) {
#ifdef GK_EMULATE
        emulator::wgmma({N, kBf16, kA == Major::mn, kB == Major::mn}, acc[0], a, nullptr, b,
                        accumulate);
#else
        detail::WgmmaShape<N>::template multiply<kBf16, kA == Major::mn, kB == Major::mn>(
            acc, a, b, accumulate);
#endif
    }

    // A from registers.
    __device__ __forceinline__ static void multiply(float (&acc)[N / 8][4], const uint32_t (&a)[4],
                                                    uint64_t b, bool accumulate) {
        static_assert(kA == Major::k, "registers hold A along k");
#ifdef GK_EMULATE
        emulator::wgmma({N, kBf16, false, kB == Major::mn}, acc[0], 0, a, b, accumulate);
#else
        detail::WgmmaShape<N>::template multiply<kBf16, kB == Major::mn>(acc, a, b, accumulate);
#endif
    }
};

}  // namespace gk
