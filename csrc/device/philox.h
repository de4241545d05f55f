// The dropout contract of gptkernels/core/philox.py, bit for bit: which element is dropped is a
// pure function of (seed, offset, position), so masks are never stored and every kernel rebuilds
// them.
//
// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) with
// key = seed, eight elements a call: lane l is the 16-bit half l & 1, low half first, of word
// l >> 1, and the element is kept iff that number >= threshold = round(65536 p).
//
// Kept elements come as bits of an unsigned, bit l for lane l.
#pragma once

#include "runtime/dropout.h"
#include "runtime/launch.h"

#include <cstdint>

namespace gk {

// What a thread needs of it: read once, before any loop.
struct DropoutKey {
    uint2 key;
    uint32_t offset;
    uint32_t threshold;
};

__device__ __forceinline__ DropoutKey dropout_key(const Dropout& dropout) {
    const uint64_t seed = static_cast<uint64_t>(dropout.rng[0]);
    return {make_uint2(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)),
            static_cast<uint32_t>(dropout.rng[1]), dropout.threshold};
}

__device__ __forceinline__ uint4 philox4x32_10(uint4 counter, uint2 key) {
    constexpr uint32_t kMultiplierX = 0xD2511F53u, kMultiplierZ = 0xCD9E8D57u;
    constexpr uint32_t kStepX = 0x9E3779B9u, kStepY = 0xBB67AE85u;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t first = static_cast<uint64_t>(kMultiplierX) * counter.x;
        const uint64_t second = static_cast<uint64_t>(kMultiplierZ) * counter.z;
        counter = make_uint4(static_cast<uint32_t>(second >> 32) ^ counter.y ^ key.x,
                             static_cast<uint32_t>(second),
                             static_cast<uint32_t>(first >> 32) ^ counter.w ^ key.y,
                             static_cast<uint32_t>(first));
        key.x += kStepX;
        key.y += kStepY;
    }
    return counter;
}

// The eight lanes of one call.
__device__ __forceinline__ uint32_t keep8(const uint4& words, uint32_t threshold) {
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
    uint32_t keep = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        keep |= static_cast<uint32_t>((word[i] & 0xffffu) >= threshold) << (2 * i);
        keep |= static_cast<uint32_t>((word[i] >> 16) >= threshold) << (2 * i + 1);
    }
    return keep;
}

__device__ __forceinline__ uint32_t elementwise_group_keep8(uint64_t group,
                                                            const DropoutKey& dropout) {
    const uint4 counter = make_uint4(static_cast<uint32_t>(group),
                                     static_cast<uint32_t>(group >> 32), 0u, dropout.offset);
    return keep8(philox4x32_10(counter, dropout.key), dropout.threshold);
}

// Elementwise dropout: bit l for element first + l of the contiguous tensor. One call where
// `first` is a multiple of 8, two where the eight elements straddle the lanes of two calls.
__device__ __forceinline__ uint32_t elementwise_keep8(int64_t first, const DropoutKey& dropout) {
    const uint64_t group = static_cast<uint64_t>(first) >> 3;
    const int skipped = static_cast<int>(first & 7);
    uint32_t keep = elementwise_group_keep8(group, dropout);
    if (skipped != 0)
        keep = (keep | elementwise_group_keep8(group + 1, dropout) << 8) >> skipped & 0xffu;
    return keep;
}

// Attention's dropout. Query row i, key j, batch_head = b * H + h:
//     c0 = (j >> 4) * 4 + ((j >> 1) & 3)     c1 = (i >> 4) * 8 + (i & 7)     c2 = batch_head
//     lane = ((i >> 3) & 1) * 4 + ((j >> 3) & 1) * 2 + (j & 1)
// The lanes of one call are what one thread holds of a 16 x 16 block of scores: two neighbouring
// 16 x 8 accumulator tiles, whose element k = 0 ... 3 lies in row lane / 4 + 8 * (k >> 1) and
// column 2 * (lane % 4) + (k & 1). Both functions below give this thread's eight bits in one
// layout, which `kept` reads. Rows and columns that are not there cost nothing extra: their bits
// are simply not looked at.

// Of tile 0 or 1 (columns 0-7 or 8-15 of the block), accumulator element k.
__device__ __forceinline__ bool kept(uint32_t keep, int tile, int k) {
    return keep >> (4 * (k >> 1) + 2 * tile + (k & 1)) & 1u;
}

// Scores with queries as rows, block at (query0, key0), both multiples of 16. One call.
__device__ __forceinline__ uint32_t attention_keep(int query0, int key0, int batch_head,
                                                   const DropoutKey& dropout) {
    const uint32_t lane = threadIdx.x % 32;
    const uint4 counter = make_uint4((static_cast<uint32_t>(key0) >> 4) * 4 + lane % 4,
                                     (static_cast<uint32_t>(query0) >> 4) * 8 + lane / 4,
                                     static_cast<uint32_t>(batch_head), dropout.offset);
    return keep8(philox4x32_10(counter, dropout.key), dropout.threshold);
}

// Scores with keys as rows, block at (key0, query0). This thread's eight elements are halves of
// two calls (query parity e = 0, 1), whose other halves (of the other key parity) belong to
// thread lane ^ 4: each of the two makes one call and they exchange. Still one call for eight
// elements, and one shuffle: the whole warp must be here.
__device__ __forceinline__ uint32_t attention_keep_transposed(int key0, int query0, int batch_head,
                                                              const DropoutKey& dropout) {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t key_parity = lane / 4 % 2;
    // Key row lane / 4, query columns 2 * (lane % 4) + e; this thread calls for e = key_parity.
    const uint4 counter =
        make_uint4((static_cast<uint32_t>(key0) >> 4) * 4 + lane / 8,
                   (static_cast<uint32_t>(query0) >> 4) * 8 + lane % 4 * 2 + key_parity,
                   static_cast<uint32_t>(batch_head), dropout.offset);
    const uint32_t own = keep8(philox4x32_10(counter, dropout.key), dropout.threshold);
    const uint32_t other = __shfl_xor_sync(0xffffffffu, own, 4);
    const uint32_t even = key_parity ? other : own, odd = key_parity ? own : other;
    // Bit 4 * query half + 2 * key half + e; then the halves change places, since keys are rows.
    const uint32_t keep = (even >> key_parity & 0x55u) | (odd >> key_parity & 0x55u) << 1;
    return (keep & 0xc3u) | (keep & 0x0cu) << 2 | (keep & 0x30u) >> 2;
}

}  // namespace gk
