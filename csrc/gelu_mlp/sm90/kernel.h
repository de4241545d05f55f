// The kernel that gelu_mlp/sm90/tiles.h describes: its roles.
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
#include "gelu_mlp/epilogue.h"
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

// ---- a warp for each consumer, which loads h and stores units

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
        if (kLayout == Layout::weight && p.splits > 1) {
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

// ---- a warpgroup that multiplies

template <class T, class C, Layout kLayout>
struct ProductConsumer {
    using Shared = ProductShared<T, C, kLayout>;
    using Multiply = Wgmma<T, C::kN, Shared::kMajorA, Shared::kMajorB>;

    const ProductSm90& p;
    const int consumer;
    const unsigned rank;
    RingPlace slot;
    float acc[C::kBlocks][C::kN / 8][4];  // not set: a tile's first products do not add to it

    __device__ __forceinline__ ProductConsumer(const ProductSm90& p, int consumer, unsigned rank)
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

    // The kernel branches once a tile and never between the values of a unit, so that the compiler
    // can interleave their work.
    enum class Finish { plain, tanh, erf };

    template <Finish kFinish>
    __device__ __forceinline__ void finish(float (&d)[8], T* out, T* activation,
                                           uint32_t bias_low, uint32_t bias_high) const {
        constexpr bool kTanh = kFinish == Finish::tanh;
        if constexpr (kLayout == Layout::forward) {
            const float2 low = floats_of<T>(bias_low), high = floats_of<T>(bias_high);
            d[0] += low.x, d[1] += low.y, d[2] += low.x, d[3] += low.y;
            d[4] += high.x, d[5] += high.y, d[6] += high.x, d[7] += high.y;
            const Pack<T, 8> rounded = pack_floats<T>(d);
            if (kFinish == Finish::plain || p.has_out) put(out, rounded);
            if constexpr (kFinish != Finish::plain) {
                activate<kTanh>(d, rounded);
                put(activation, pack_floats<T>(d));
            }
        } else if constexpr (kFinish != Finish::plain) {
            uint32_t words[4];
            ldmatrix_x4(words, out);  // h lies where dh will go
            Pack<T, 8> pack;
            memcpy(&pack, words, sizeof pack);
            float h[8];
            unpack_floats(h, pack);
            differentiate<kTanh>(d, h);
            if (p.has_activation) put(activation, pack_floats<T>(h));
            put(out, pack_floats<T>(d));
        } else {
            put(out, pack_floats<T>(d));
        }
    }

    // Loads this lane's pairs of the bias in a unit's 8-column groups; they stay 0 without a bias.
    // Groups past the end of a row load the first group, which saves a branch.
    __device__ __forceinline__ void load_bias(uint32_t (&pairs)[kUnitCols / 8], int col) const {
        if (p.bias == nullptr) return;
        const int lane_col = lane_index() % 4 * 2, cols = static_cast<int>(p.n);
#pragma unroll
        for (int j = 0; j < kUnitCols / 8; ++j) {
            const int from = (col + 8 * j < cols ? col + 8 * j : 0) + lane_col;
            pairs[j] = *reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.bias) + from);
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

    __device__ __forceinline__ void store(const ProductPlace& place) {
        if constexpr (kLayout == Layout::weight) {
            p.splits > 1 ? store_partial(place) : store_units<Finish::plain>(place);
        } else {
            if (kLayout == Layout::forward ? !p.has_activation : !p.has_h) {
                store_units<Finish::plain>(place);
            } else if (p.tanh) {
                store_units<Finish::tanh>(place);
            } else {
                store_units<Finish::erf>(place);
            }
        }
    }

    // Whether block i of this consumer has any row in D.
    __device__ __forceinline__ bool has_block(const ProductPlace& place, int i) const {
        return place.m + (C::kPingpong ? 0 : consumer * C::kRows) + kUnitRows * i < p.m;
    }

    template <Finish kFinish>
    __device__ __forceinline__ void store_units(const ProductPlace& place) {
#pragma unroll
        for (int i = 0; i < C::kBlocks; ++i) {
            if (!has_block(place, i)) break;
            store_block<kFinish>(acc[i], static_cast<int>(place.n));
        }
    }

    template <Finish kFinish>
    __device__ __forceinline__ void store_block(const float (&block)[C::kN / 8][4], int n) {
#pragma unroll
        for (int panel = 0; panel < C::kN / kUnitCols; ++panel) {
            const int col = n + kUnitCols * panel;
            if (col >= p.n) break;
            uint32_t bias[kUnitCols / 8] = {};
            if constexpr (kLayout == Layout::forward) load_bias(bias, col);
            const int first = begin();
            const auto out = Shared::unit(consumer, first);
            const auto activation = Shared::unit(consumer, first + p.outputs() - 1);
#pragma unroll
            for (int j = 0; j < kUnitCols / 8; j += 2) {
                float d[8];
                sixteen(d, block[8 * panel + j], block[8 * panel + j + 1]);
                finish<kFinish>(d, fragment(out, 8 * j), fragment(activation, 8 * j), bias[j],
                                bias[j + 1]);
            }
            end(first);
        }
    }

    // Stores the results as fp32, in units of half as many columns.
    __device__ __forceinline__ void store_partial(const ProductPlace& place) {
        constexpr int kCols = kUnitCols / 2;
        const int row = warp_row() + lane_index() / 4, pair = lane_index() % 4 * 2;
#pragma unroll
        for (int i = 0; i < C::kBlocks; ++i) {
            if (!has_block(place, i)) break;
#pragma unroll
            for (int panel = 0; panel < C::kN / kCols; ++panel) {
                if (place.n + kCols * panel >= p.n) break;
                const int first = begin();
                const auto unit = Shared::unit(consumer, first);
#pragma unroll
                for (int j = 0; j < kCols / 8; ++j) {
                    const float(&d)[4] = acc[i][kCols / 8 * panel + j];
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        // A column of fp32 takes two columns of 16 bits.
                        T* to = unit.at(row + 8 * half, 2 * (8 * j + pair));
                        *reinterpret_cast<float2*>(to) = make_float2(d[2 * half], d[2 * half + 1]);
                    }
                }
                end(first);
            }
        }
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
            store(place);
        }
    }

    // Moves on past the stages of a tile that the other consumer takes.
    __device__ __forceinline__ static void skip(PipelineState<C::kStages>& state, unsigned steps) {
        const unsigned to = state.stage + steps;
        state.phase ^= to / C::kStages & 1;
        state.stage = static_cast<int>(to % C::kStages);
    }
};

template <class T, class C, Layout kLayout>
__global__ void __launch_bounds__(C::kThreads, 1)
    product_sm90_kernel(const __grid_constant__ ProductSm90 p) {
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
            ProductStorer<T, C, kLayout>::run(p, warp - 1, rank);
        }
    } else {
        warpgroup_reg_alloc<C::kManyRegisters>();
        ProductConsumer<T, C, kLayout>(p, group - 1, rank).run();
    }
    // The other CTA may still write to this one's shared memory and arrive at its barriers.
    if constexpr (C::kCluster > 1) {
        __syncwarp();
        cluster_sync();
    }
}

}  // namespace gk
