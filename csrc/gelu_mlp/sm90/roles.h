// The roles of the kernels that gelu_mlp/sm90/tiles.h describes. What the warpgroups that multiply
// do to their results is another struct's, which derives from ProductMultiplier:
// gelu_mlp/sm90/kernel.h and linear_cross_entropy/sm90/kernel.h.
#pragma once

#include <cstring>

#include "device/cluster.h"
#include "device/mbarrier.h"
#include "device/mma.h"
#include "device/pipeline.h"
#include "device/stmatrix.h"
#include "device/swizzled.h"
#include "device/tile.h"
#include "device/tma.h"
#include "device/vector.h"
#include "device/warpgroup.h"
#include "device/wgmma.h"
#include "gelu_mlp/sm90/walk.h"

namespace gk {

// ---- the warp that loads A and B, by one of its threads

template <class T, class C, Layout kLayout>
struct ProductLoader {
    using Shared = ProductShared<T, C, kLayout>;

    // Loads the panels of a tile: 64 elements of the innermost dimension each, in kBoxRows rows
    // from row_in_tile on. kShared: for every CTA of the cluster.
    template <int kBoxRows, bool kShared, class Tile>
    __device__ __forceinline__ static void load(const Tile& tile, const TensorMap* map,
                                                uint64_t* bar, int row_in_tile, int col, int row) {
#pragma unroll
        for (int i = 0; i < Tile::kPanels; ++i) {
            T* to = tile.panel(i) + row_in_tile * kUnitCols;
            const Coordinates<2> at{{col + kUnitCols * i, row + row_in_tile}};
            if constexpr (kShared) {
                tma_load_multicast(to, map, bar, at, (1u << C::kCluster) - 1);
            } else {
                tma_load(to, map, bar, at);
            }
        }
    }

    __device__ __forceinline__ static void run(const ProductSm90& p, unsigned rank) {
        PipelineState<C::kStages> state;
        for (unsigned item = blockIdx.x / C::kCluster; item < p.items;
             item += gridDim.x / C::kCluster) {
            const ProductPlace place = place_of<C>(p, item, rank);
            const int m = static_cast<int>(place.m), n = static_cast<int>(place.n);
#pragma unroll 1
            for (unsigned step = 0; step < place.steps; ++step) {
                const int k = static_cast<int>(place.first + step) * C::kK;
                const auto tile_a = Shared::a(state.stage);
                const auto tile_b = Shared::b(state.stage);
                uint64_t* full = Shared::full(state.stage);
                // Waits until all readers are done with this stage. If B is shared, the other CTA's
                // consumers read it too, and they arrive at this barrier as this CTA's consumers
                // do.
                mbarrier_wait(Shared::empty(state.stage), state.phase ^ 1);
                mbarrier_arrive_expect_tx(full, C::kStageBytes);
                constexpr int kRowsA = decltype(tile_a)::kRows, kRowsB = decltype(tile_b)::kRows;
                if constexpr (Shared::kMajorA == Major::k) {
                    load<kRowsA, false>(tile_a, &p.a, full, 0, k, m);
                } else {
                    load<kRowsA, false>(tile_a, &p.a, full, 0, m, k);
                }
                // Every CTA loads a share of B's rows, for all CTAs of the cluster.
                constexpr int kShare = kRowsB / C::kCluster;
                const int from = static_cast<int>(rank) * kShare;
                if constexpr (Shared::kMajorB == Major::k) {
                    load<kShare, (C::kCluster > 1)>(tile_b, &p.b, full, from, k, n);
                } else {
                    load<kShare, (C::kCluster > 1)>(tile_b, &p.b, full, from, n, k);
                }
                state.advance();
            }
        }
    }
};

// ---- a warp for each consumer, which loads h, or what is added, and stores units

template <class T, class C, Layout kLayout>
struct ProductStorer {
    using Shared = ProductShared<T, C, kLayout>;
    using Walk = Units<T, C, kLayout>;

    // Makes the slots of a coming unit ready: at once, or with h as soon as h has arrived in them.
    __device__ __forceinline__ static void prepare(const Walk& unit, int slot) {
        uint64_t* ready = Shared::ready(unit.consumer, slot);
        if (unit.p.has_h) {
            mbarrier_arrive_expect_tx(ready, kUnitBytes);
            tma_load(Shared::unit(unit.consumer, slot).data, &unit.p.h, ready,
                     Coordinates<2>{{unit.col(), unit.row()}});
        } else {
            mbarrier_arrive(ready);
        }
    }

    __device__ __forceinline__ static void store(const Walk& unit, int slot) {
        const ProductSm90& p = unit.p;
        const T* first = Shared::unit(unit.consumer, slot).data;
        const Coordinates<2> at{{unit.col(), unit.row()}};
        if (kLayout != Layout::forward && p.wide) {
            const int split = static_cast<int>(unit.place.split);
            tma_store(&p.out, first, Coordinates<3>{{at.at[0], at.at[1], split}});
        } else if (p.has_out) {
            tma_store(&p.out, first, at);
        }
        if (p.has_activation) {
            tma_store(&p.activation, Shared::unit(unit.consumer, slot + p.has_out).data, at);
        }
        bulk_commit();
    }

    // Sums the columns of dh, as stored, over the unit's rows. Each lane takes two columns.
    __device__ __forceinline__ static void sum_columns(const Walk& unit, int slot) {
        const auto tile = Shared::unit(unit.consumer, slot);
        const int rows = static_cast<int>(min(unit.p.m - unit.row(), int64_t{kUnitRows}));
        const int col = 2 * lane_index();
        float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll 4
        for (int row = 0; row < rows; ++row) {
            const float2 pair = floats_of<T>(*reinterpret_cast<const uint32_t*>(tile.at(row, col)));
            sum.x += pair.x;
            sum.y += pair.y;
        }
        if (unit.col() + col < unit.p.n) {
            float* to = unit.p.partial + unit.row() / kUnitRows * unit.p.n + unit.col() + col;
            *reinterpret_cast<float2*>(to) = sum;
        }
    }

    __device__ __forceinline__ static void run(const ProductSm90& p, int consumer, unsigned rank) {
        const int outputs = p.outputs(), length = C::kSlots / outputs;
        Walk next(p, consumer, rank), unit(p, consumer, rank);
        RingPlace free, full;
        const bool first = lane_index() == 0;
        for (int i = 0; i < length && next.any(); ++i, next.advance(), free.advance(length)) {
            if (first) prepare(next, free.at * outputs);
        }
        for (; unit.any(); unit.advance(), full.advance(length)) {
            const int slot = full.at * outputs;
            mbarrier_wait(Shared::done(consumer, slot), full.phase);
            if (first) store(unit, slot);
            if constexpr (kLayout == Layout::backward) {
                if (p.partial != nullptr) sum_columns(unit, slot);
                __syncwarp();  // before the slot is written again
            }
            if (first) bulk_wait_read<0>();
            if (next.any()) {
                if (first) prepare(next, free.at * outputs);
                next.advance();
                free.advance(length);
            }
        }
    }
};

// ---- a warpgroup that multiplies; Self::store(place) takes the results

template <class T, class C, Layout kLayout, class Self>
struct ProductMultiplier {
    using Shared = ProductShared<T, C, kLayout>;
    using Multiply = Wgmma<T, C::kN, Shared::kMajorA, Shared::kMajorB>;

    const ProductSm90& p;
    const int consumer;
    const unsigned rank;
    RingPlace slot;
    float acc[C::kBlocks][C::kN / 8][4];  // not set: a tile's first products do not add to it

    __device__ __forceinline__ ProductMultiplier(const ProductSm90& p, int consumer, unsigned rank)
        : p(p), consumer(consumer), rank(rank) {}

    // acc = A B over one tile's steps.
    __device__ __forceinline__ void multiply(unsigned steps, PipelineState<C::kStages>& state) {
        int last = 0;
        for (unsigned step = 0; step < steps; ++step) {
            mbarrier_wait(Shared::full(state.stage), state.phase);
            const auto tile_a = Shared::a(state.stage);
            const auto tile_b = Shared::b(state.stage);
            const int row = C::kPingpong ? 0 : consumer * C::kRows;
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < C::kK; k += 16) {
#pragma unroll
                for (int i = 0; i < C::kBlocks; ++i) {
                    const uint64_t a = Shared::kMajorA == Major::k
                                           ? tile_a.k_major(row + kUnitRows * i, k)
                                           : tile_a.mn_major(k, row + kUnitRows * i);
                    const uint64_t b = Shared::kMajorB == Major::k ? tile_b.k_major(0, k)
                                                                   : tile_b.mn_major(k, 0);
                    Multiply::multiply(acc[i], a, b, step > 0 || k > 0);
                }
            }
            wgmma_commit();
            if (step > 0) {
                wgmma_wait<1>();  // until the step before is done, whose stage is then free
                release(last);
            }
            last = state.stage;
            state.advance();
        }
        // The other consumer's products may follow while the last products of this tile still run.
        if constexpr (C::kPingpong) pass_turn();
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < C::kBlocks; ++i) wgmma_fence_registers(acc[i]);
        release(last);
    }

    __device__ __forceinline__ static void release(int stage) {
        if constexpr (C::kCluster > 1) {
            const int lane = lane_index();
            if (lane < C::kCluster) mbarrier_arrive_cluster(Shared::empty(stage), lane);
        } else {
            if (lane_index() == 0) mbarrier_arrive(Shared::empty(stage));
        }
    }

    // ---- the tensor cores' turn, in ping-pong

    static constexpr unsigned kFirstTurnBarrier = 1, kTurnThreads = 256;
    bool followed = false;  // whether the other consumer has a tile after this one

    __device__ __forceinline__ void take_turn() const {
        named_barrier_sync(kFirstTurnBarrier + consumer, kTurnThreads);
    }
    __device__ __forceinline__ void pass_turn() const {
        if (followed) named_barrier_arrive(kFirstTurnBarrier + 1 - consumer, kTurnThreads);
    }

    // ---- what happens to the results

    // This lane's address for ldmatrix and stmatrix of the warp's 16 rows and of 16 columns from
    // `col` on.
    template <class Tile>
    __device__ __forceinline__ static T* fragment(const Tile& tile, int col) {
        const int lane = lane_index();
        return tile.at(warp_row() + lane % 16, col + lane / 16 * 8);
    }
    __device__ __forceinline__ static int warp_row() {
        return static_cast<int>(threadIdx.x) / 32 % 4 * 16;
    }

    __device__ __forceinline__ static void put(T* to, const Pack<T, 8>& pack) {
        uint32_t words[4];
        memcpy(words, &pack, sizeof words);
        stmatrix_x4(to, words);
    }

    // Two neighbouring 8-column groups of one unit's accumulators, in the order of stmatrix: both
    // rows of the first group, then both rows of the second.
    __device__ __forceinline__ void sixteen(float (&d)[8], const float (&low)[4],
                                            const float (&high)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            d[i] = low[i];
            d[4 + i] = high[i];
        }
    }

    // `begin` waits until a unit's slots are ready for its values; `end` hands them to the warp
    // that stores them.
    __device__ __forceinline__ int begin() const {
        const int first = slot.at * p.outputs();
        mbarrier_wait(Shared::ready(consumer, first), slot.phase);
        return first;
    }
    __device__ __forceinline__ void end(int first) {
        fence_proxy_async();
        __syncwarp();
        if (lane_index() == 0) mbarrier_arrive(Shared::done(consumer, first));
        slot.advance(C::kSlots / p.outputs());
    }

    // The first row in D of block i of this consumer, and whether that exists.
    __device__ __forceinline__ int64_t block_row(const ProductPlace& place, int i) const {
        return place.m + (C::kPingpong ? 0 : consumer * C::kRows) + kUnitRows * i;
    }
    __device__ __forceinline__ bool has_block(const ProductPlace& place, int i) const {
        return block_row(place, i) < p.m;
    }

    __device__ __forceinline__ void run() {
        PipelineState<C::kStages> state;
        const unsigned stride = gridDim.x / C::kCluster;
        int turn = 0;
        for (unsigned item = blockIdx.x / C::kCluster; item < p.items; item += stride, ++turn) {
            const ProductPlace place = place_of<C>(p, item, rank);
            if constexpr (C::kPingpong) {
                if (turn % C::kConsumers != consumer) {
                    skip(state, place.steps);
                    continue;
                }
                if (turn > 0) take_turn();
                followed = p.items - item > stride;
            }
            multiply(place.steps, state);
            static_cast<Self*>(this)->store(place);
        }
    }

    // Moves on past the stages of a tile that the other consumer takes.
    __device__ __forceinline__ static void skip(PipelineState<C::kStages>& state, unsigned steps) {
        const unsigned to = state.stage + steps;
        state.phase ^= to / C::kStages & 1;
        state.stage = static_cast<int>(to % C::kStages);
    }
};

// What the threads of a CTA do, each in its role. kStores: whether units are stored. A consumer is
// made with what comes after p, too.
template <class T, class C, Layout kLayout, bool kStores, class Consumer, class... More>
__device__ __forceinline__ void run_product(const ProductSm90& p, const More&... more) {
    using Shared = ProductShared<T, C, kLayout>;
    // The value is the same in all lanes of a warp; the shuffle lets the compiler know that.
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
    const int group = warp / 4;  // 0 loads and stores, the others multiply
    const unsigned rank = C::kCluster > 1 ? cluster_rank() : 0;

    if (threadIdx.x == 0) {
        tma_prefetch(&p.a);
        tma_prefetch(&p.b);
        constexpr int kReaders = (C::kPingpong ? 1 : C::kConsumers) * 4;  // warps in each CTA
        for (int i = 0; i < C::kStages; ++i) {
            mbarrier_init(Shared::full(i), 1);
            mbarrier_init(Shared::empty(i), kReaders * C::kCluster);
        }
        for (int c = 0; c < C::kConsumers; ++c) {
            for (int i = 0; i < C::kSlots; ++i) {
                mbarrier_init(Shared::ready(c, i), 1);
                mbarrier_init(Shared::done(c, i), 4);
            }
        }
        mbarrier_init_fence();
    }
    if constexpr (C::kCluster > 1) {
        cluster_sync();
    } else {
        __syncthreads();
    }

    if (group == 0) {
        warpgroup_reg_dealloc<C::kFewRegisters>();
        if (warp == 0) {
            if (lane_index() == 0) ProductLoader<T, C, kLayout>::run(p, rank);
        } else if (warp <= C::kConsumers) {
            if constexpr (kStores) ProductStorer<T, C, kLayout>::run(p, warp - 1, rank);
        }
    } else {
        warpgroup_reg_alloc<C::kManyRegisters>();
        Consumer{p, group - 1, rank, more...}.run();
    }
    // The other CTA may still write to this one's shared memory and arrive at its barriers.
    if constexpr (C::kCluster > 1) {
        __syncwarp();
        cluster_sync();
    }
}

}  // namespace gk
