// What the roles of gelu_mlp/sm90/roles.h share: the layout of shared memory, and the order of
// tiles and units.
#pragma once

#include <type_traits>

#include "device/swizzled.h"
#include "device/wgmma.h"
#include "gelu_mlp/sm90/tiles.h"

namespace gk {

// The layout of shared memory.
template <class T, class C, Layout kLayout>
struct ProductShared {
    static constexpr Major kMajorA = kLayout == Layout::weight ? Major::mn : Major::k;
    static constexpr Major kMajorB = kLayout == Layout::forward ? Major::k : Major::mn;
    template <Major kMajor, int kSize>
    using Tile = std::conditional_t<kMajor == Major::k, SwizzledTile<T, kSize, C::kK>,
                                    SwizzledTile<T, C::kK, kSize>>;
    using TileA = Tile<kMajorA, C::kM>;
    using TileB = Tile<kMajorB, C::kN>;
    using Unit = SwizzledTile<T, kUnitRows, kUnitCols>;
    static_assert(TileA::kBytes == C::kABytes && TileB::kBytes == C::kBBytes, "whole panels");

    __device__ static TileA a(int stage) {
        return {reinterpret_cast<T*>(shared_memory() + stage * C::kStageBytes)};
    }
    __device__ static TileB b(int stage) {
        return {reinterpret_cast<T*>(shared_memory() + stage * C::kStageBytes + C::kABytes)};
    }
    __device__ static Unit unit(int consumer, int slot) {
        return {reinterpret_cast<T*>(shared_memory() + C::kStages * C::kStageBytes +
                                     (consumer * C::kSlots + slot) * kUnitBytes)};
    }

    // ---- barriers
    __device__ static uint64_t* barrier(int number) {
        static_assert((2 * C::kStages + 2 * C::kConsumers * C::kSlots) * 8 <= C::kBarrierBytes,
                      "room for them");
        return reinterpret_cast<uint64_t*>(shared_memory() + C::kSharedBytes - C::kBarrierBytes) +
               number;
    }
    __device__ static uint64_t* full(int stage) { return barrier(stage); }
    __device__ static uint64_t* empty(int stage) { return barrier(C::kStages + stage); }
    __device__ static uint64_t* ready(int consumer, int slot) {
        return barrier(2 * C::kStages + consumer * C::kSlots + slot);
    }
    __device__ static uint64_t* done(int consumer, int slot) {
        return barrier(2 * C::kStages + (C::kConsumers + consumer) * C::kSlots + slot);
    }
};

// Where an item of work lies in D and along k.
struct ProductPlace {
    int64_t m, n;  // the first row and column of the CTA's tile
    unsigned first, steps, split;
};

// Clusters go down `group` row tiles, then on to the next columns. The splits of k come one after
// another.
template <class C>
__device__ __forceinline__ ProductPlace place_of(const ProductSm90& p, unsigned item,
                                                 unsigned rank) {
    const unsigned tiles = p.tiles_m * p.tiles_n;
    const unsigned split = item / tiles, tile = item % tiles;
    const unsigned top = tile / (p.group * p.tiles_n) * p.group;
    const unsigned height = min(p.tiles_m - top, p.group);
    const unsigned at = tile - top * p.tiles_n;
    const unsigned first = p.steps * split / p.splits;
    return {(static_cast<int64_t>(top + at % height) * C::kCluster + rank) * C::kM,
            static_cast<int64_t>(at / height) * C::kN, first,
            p.steps * (split + 1) / p.splits - first, split};
}

// A place in a ring of `length` slots, and a phase bit that changes with each round.
struct RingPlace {
    int at = 0;
    unsigned phase = 0;
    __device__ __forceinline__ void advance(int length) {
        if (++at == length) {
            at = 0;
            phase ^= 1;
        }
    }
};

// The units of one consumer in the order in which it computes them: tile after tile, in each the
// blocks, in each the panels. Units that lie outside D altogether are left out.
template <class T, class C, Layout kLayout>
struct Units {
    const ProductSm90& p;
    int consumer;
    unsigned rank, stride, item;
    int cols;  // columns of a unit
    int block = 0, panel = -1;
    ProductPlace place = {};

    __device__ __forceinline__ Units(const ProductSm90& p, int consumer, unsigned rank)
        : p(p), consumer(consumer), rank(rank), stride(gridDim.x / C::kCluster),
          item(blockIdx.x / C::kCluster),
          cols(kLayout != Layout::forward && p.wide ? kUnitCols / 2 : kUnitCols) {
        if constexpr (C::kPingpong) {
            item += consumer * stride;
            stride *= C::kConsumers;
        }
        if (item < p.items) place = place_of<C>(p, item, rank);
        advance();
    }

    __device__ __forceinline__ bool any() const { return item < p.items; }
    __device__ __forceinline__ int row() const {
        return static_cast<int>(place.m) + (C::kPingpong ? 0 : consumer * C::kRows) +
               block * kUnitRows;
    }
    __device__ __forceinline__ int col() const { return static_cast<int>(place.n) + panel * cols; }

    __device__ __forceinline__ void advance() {
        ++panel;
        while (item < p.items) {
            if (block < C::kBlocks && row() < p.m) {
                if (panel * cols < C::kN && col() < p.n) return;
                ++block;
            } else {
                item += stride;
                block = 0;
                if (item < p.items) place = place_of<C>(p, item, rank);
            }
            panel = 0;
        }
    }
};

}  // namespace gk
