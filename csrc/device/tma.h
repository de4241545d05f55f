// The tensor memory accelerator: copies between global and shared memory that one thread starts and
// no thread carries out (PTX ISA, "cp.async.bulk.tensor", "cp.reduce.async.bulk" and neighbours).
//
// A load reports to a barrier (device/mbarrier.h): its bytes count towards those that the barrier
// expects. A thread that has waited for the barrier's phase sees the data. A box counts in full,
// also the parts outside the tensor, which are zero.
//
// Stores and reductions belong to the group that the thread's next bulk_commit closes. The thread
// waits for its groups before the shared memory is written again (bulk_wait_read) and before it
// ends. They read shared memory through another path, the asynchronous proxy. So each thread that
// wrote the data calls fence_proxy_async before the barrier at which the storing thread waits.
//
// One thread calls each function. Shared addresses are multiples of 128 for boxes, of 16 for
// contiguous bytes.
#pragma once

#include "device/shared_address.h"
#include "runtime/tensor_map.h"

#ifdef GK_EMULATE
#include "emulator/async/tma.h"
#endif

namespace gk {

// Where a box's first element is in each dimension, innermost first; may be negative.
template <int N>
struct Coordinates {
    static_assert(N >= 1 && N <= 5, "a tensor map has 1 to 5 dimensions");
    int at[N];
};

// What L2 does with the lines of a load. evict_last is for data that is read again, such as the
// keys and values that all tiles of a head read; evict_first is for data that is read once.
enum class CacheHint { none, evict_first, evict_last };

namespace detail {

#ifndef GK_EMULATE
// The policies that createpolicy.fractional returns for all of the lines.
__device__ __forceinline__ uint64_t cache_policy(CacheHint hint) {
    switch (hint) {
        case CacheHint::evict_first: return 0x12f0000000000000;
        case CacheHint::evict_last: return 0x14f0000000000000;
        case CacheHint::none: break;
    }
    return 0x1000000000000000;
}

// One instruction for each rank; the coordinates are its last operands.
#define GK_COORDINATES_1(c) "r"((c)[0])
#define GK_COORDINATES_2(c) GK_COORDINATES_1(c), "r"((c)[1])
#define GK_COORDINATES_3(c) GK_COORDINATES_2(c), "r"((c)[2])
#define GK_COORDINATES_4(c) GK_COORDINATES_3(c), "r"((c)[3])
#define GK_COORDINATES_5(c) GK_COORDINATES_4(c), "r"((c)[4])

#define GK_LOAD(rank, multicast, mask_operand, numbers)                                   \
    asm volatile("cp.async.bulk.tensor." #rank                                            \
                 "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes" multicast   \
                 ".L2::cache_hint [%0], [%1, {" numbers "}], [%2]" mask_operand ", %3;\n" \
                 ::"r"(to), "l"(map), "r"(bar), "l"(policy), "h"(mask),                   \
                 GK_COORDINATES_##rank(at)                                                \
                 : "memory")
#define GK_STORE(rank, operation, kind, numbers)                                          \
    asm volatile("cp." operation "async.bulk.tensor." #rank "d.global.shared::cta" kind   \
                 ".tile.bulk_group [%0, {" numbers "}], [%1];\n"                          \
                 ::"l"(map), "r"(from), GK_COORDINATES_##rank(at)                         \
                 : "memory")

template <bool kMulticast, int N>
__device__ __forceinline__ void load_box(unsigned to, const TensorMap* map, unsigned bar,
                                         const int (&at)[N], uint64_t policy, uint16_t mask) {
    if constexpr (kMulticast) {
        if constexpr (N == 1) GK_LOAD(1, ".multicast::cluster", ", %4", "%5");
        if constexpr (N == 2) GK_LOAD(2, ".multicast::cluster", ", %4", "%5, %6");
        if constexpr (N == 3) GK_LOAD(3, ".multicast::cluster", ", %4", "%5, %6, %7");
        if constexpr (N == 4) GK_LOAD(4, ".multicast::cluster", ", %4", "%5, %6, %7, %8");
        if constexpr (N == 5) GK_LOAD(5, ".multicast::cluster", ", %4", "%5, %6, %7, %8, %9");
    } else {
        if constexpr (N == 1) GK_LOAD(1, "", "", "%5");
        if constexpr (N == 2) GK_LOAD(2, "", "", "%5, %6");
        if constexpr (N == 3) GK_LOAD(3, "", "", "%5, %6, %7");
        if constexpr (N == 4) GK_LOAD(4, "", "", "%5, %6, %7, %8");
        if constexpr (N == 5) GK_LOAD(5, "", "", "%5, %6, %7, %8, %9");
    }
}

template <bool kAdd, int N>
__device__ __forceinline__ void store_box(const TensorMap* map, unsigned from, const int (&at)[N]) {
    if constexpr (kAdd) {
        if constexpr (N == 1) GK_STORE(1, "reduce.", ".add", "%2");
        if constexpr (N == 2) GK_STORE(2, "reduce.", ".add", "%2, %3");
        if constexpr (N == 3) GK_STORE(3, "reduce.", ".add", "%2, %3, %4");
        if constexpr (N == 4) GK_STORE(4, "reduce.", ".add", "%2, %3, %4, %5");
        if constexpr (N == 5) GK_STORE(5, "reduce.", ".add", "%2, %3, %4, %5, %6");
    } else {
        if constexpr (N == 1) GK_STORE(1, "", "", "%2");
        if constexpr (N == 2) GK_STORE(2, "", "", "%2, %3");
        if constexpr (N == 3) GK_STORE(3, "", "", "%2, %3, %4");
        if constexpr (N == 4) GK_STORE(4, "", "", "%2, %3, %4, %5");
        if constexpr (N == 5) GK_STORE(5, "", "", "%2, %3, %4, %5, %6");
    }
}

#undef GK_LOAD
#undef GK_STORE
#undef GK_COORDINATES_1
#undef GK_COORDINATES_2
#undef GK_COORDINATES_3
#undef GK_COORDINATES_4
#undef GK_COORDINATES_5
#endif

}  // namespace detail

// Fetches the map itself, so that the first copy need not wait for it.
__device__ __forceinline__ void tma_prefetch(const TensorMap* map) {
#ifdef GK_EMULATE
    emulator::tma_prefetch(map);
#else
    asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
#endif
}

// Loads the box at `at` into shared memory, row after row, swizzled as the map says.
template <int N>
__device__ __forceinline__ void tma_load(void* shared, const TensorMap* map, uint64_t* bar,
                                         Coordinates<N> at, CacheHint hint = CacheHint::none) {
#ifdef GK_EMULATE
    emulator::tma_load(shared, map, bar, at.at, N);
#else
    detail::load_box<false>(shared_address(shared), map, shared_address(bar), at.at,
                            detail::cache_policy(hint), 0);
#endif
}

// The same, into every CTA of the cluster whose bit is set in `mask`: to the same place in its own
// shared memory, reported to its own barrier at the same place.
template <int N>
__device__ __forceinline__ void tma_load_multicast(void* shared, const TensorMap* map,
                                                   uint64_t* bar, Coordinates<N> at, uint16_t mask,
                                                   CacheHint hint = CacheHint::none) {
#ifdef GK_EMULATE
    emulator::tma_load_multicast(shared, map, bar, at.at, N, mask);
#else
    detail::load_box<true>(shared_address(shared), map, shared_address(bar), at.at,
                           detail::cache_policy(hint), mask);
#endif
}

// Stores the box at `at` from shared memory, where it is laid out as a load would leave it.
template <int N>
__device__ __forceinline__ void tma_store(const TensorMap* map, const void* shared,
                                          Coordinates<N> at) {
#ifdef GK_EMULATE
    emulator::tma_store(map, shared, at.at, N);
#else
    detail::store_box<false>(map, shared_address(shared), at.at);
#endif
}

// The same, but adds to what is there. Each element's addition is atomic; several additions to one
// element come in any order.
template <int N>
__device__ __forceinline__ void tma_reduce_add(const TensorMap* map, const void* shared,
                                               Coordinates<N> at) {
#ifdef GK_EMULATE
    emulator::tma_reduce_add(map, shared, at.at, N);
#else
    detail::store_box<true>(map, shared_address(shared), at.at);
#endif
}

// Copies of contiguous bytes, without a map. Addresses and `bytes` are multiples of 16.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, unsigned bytes,
                                          uint64_t* bar) {
#ifdef GK_EMULATE
    emulator::bulk_load(shared, global, bytes, bar);
#else
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];\n" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(bar))
                 : "memory");
#endif
}

__device__ __forceinline__ void bulk_store(void* global, const void* shared, unsigned bytes) {
#ifdef GK_EMULATE
    emulator::bulk_store(global, shared, bytes);
#else
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n" ::"l"(
                     __cvta_generic_to_global(global)),
                 "r"(shared_address(shared)), "r"(bytes)
                 : "memory");
#endif
}

__device__ __forceinline__ void bulk_reduce_add(float* global, const float* shared,
                                                unsigned bytes) {
#ifdef GK_EMULATE
    emulator::bulk_reduce_add(global, shared, bytes);
#else
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 "
                 "[%0], [%1], %2;\n" ::"l"(__cvta_generic_to_global(global)),
                 "r"(shared_address(shared)), "r"(bytes)
                 : "memory");
#endif
}

__device__ __forceinline__ void bulk_commit() {
#ifdef GK_EMULATE
    emulator::bulk_commit();
#else
    asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
#endif
}

// Waits until all but the thread's N newest groups have read their shared memory, which may then be
// written again.
template <int N>
__device__ __forceinline__ void bulk_wait_read() {
#ifdef GK_EMULATE
    emulator::bulk_wait_read(N);
#else
    asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(N) : "memory");
#endif
}

// Waits until they have also written global memory; this thread then sees what they wrote.
template <int N>
__device__ __forceinline__ void bulk_wait() {
#ifdef GK_EMULATE
    emulator::bulk_wait(N);
#else
    asm volatile("cp.async.bulk.wait_group %0;\n" ::"n"(N) : "memory");
#endif
}

// Copies and wgmma that come after the next barrier see what this thread wrote to shared memory by
// ordinary stores.
__device__ __forceinline__ void fence_proxy_async() {
#ifdef GK_EMULATE
    emulator::fence_proxy_async();
#else
    asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

}  // namespace gk
