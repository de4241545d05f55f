// Attention backward on Hopper, main kernel: what the warpgroups that multiply share, whichever way
// they divide dk and dv. See attention/bwd/sm90/kernel.h.
#pragma once

#include "attention/bwd/sm90/main.h"
#include "device/exp2.h"
#include "device/mma.h"
#include "device/stmatrix.h"
#include "device/wgmma.h"

namespace gk {

template <class T, class Tiles>
struct BwdConsumer {
    static constexpr int kRows = Tiles::kRows, kWidth = Tiles::kWidth, kKeys = Tiles::kKeys;
    static constexpr int kDqTiles = Tiles::kDqPasses * Tiles::kDqCols / 8;
    using Left = typename Mma<T>::A;  // p or ds, rounded: left operands, and what stmatrix stores
    using Dq = float[kDqTiles][4];

    const BwdSm90& a;
    const BwdWork<Tiles>& work;
    unsigned char* arena;
    int consumer;
    int row;   // the thread's first row of a warpgroup's 64: + 8
    int pair;  // and column in each 8: + 1

    __device__ typename Tiles::Key key_tile(int offset) const {
        return {reinterpret_cast<T*>(arena + offset)};
    }
    __device__ typename Tiles::Query query_tile(int offset, int stage) const {
        return {reinterpret_cast<T*>(arena + offset + stage * Tiles::Query::kBytes)};
    }
    __device__ typename Tiles::Slope slope_tile(int stage) const {
        return {reinterpret_cast<T*>(arena + Tiles::kSlope + stage * Tiles::Slope::kBytes)};
    }
    // Statistics of a stage's rows: lse, then delta.
    __device__ const float* stats(int stage) const {
        return reinterpret_cast<const float*>(arena + Tiles::kStats + stage * Tiles::kStatsBytes);
    }

    // This warp has done with a stage.
    __device__ __forceinline__ static void release(uint64_t* bar) {
        __syncwarp();
        if (lane_index() == 0) mbarrier_arrive(bar);
    }

    // Waits for k. Keys past their batch entry's length may hold NaN, which 0 times would be NaN in
    // dq: they are cleared. TMA clears those past the last one.
    __device__ void wait_for_keys(const BwdBarriers<Tiles>& bars) const {
        mbarrier_wait(bars.k(), 0);
        const int valid = work.band.count - work.j0;
        if (valid >= kKeys || work.band.count == a.p.call.Tk) return;
        mbarrier_wait(bars.v(), 0);
        constexpr int kChunks = Tiles::Key::kPanels * kPanelCols / 8;
        for (int i = valid * kChunks + static_cast<int>(threadIdx.x) - 128; i < kKeys * kChunks;
             i += Tiles::kConsumerThreads) {
            st128_shared(key_tile(0).at(i / kChunks, i % kChunks * 8), Pack<T, 8>{});
            st128_shared(key_tile(Tiles::kV).at(i / kChunks, i % kChunks * 8), Pack<T, 8>{});
        }
        fence_proxy_async();
        named_barrier_sync(kSlopesThere, Tiles::kConsumerThreads);
    }

    // Of p and ds: rows of queries, from col on.
    __device__ __forceinline__ static void put(const typename Tiles::Slope& tile, int col,
                                               const Left& left) {
        const int lane = lane_index(), warp = static_cast<int>(threadIdx.x) / 32 % 4;
        stmatrix_x4(tile.at(16 * warp + lane % 16, col + lane / 16 * 8), left.r);
    }

    // The same of accumulators whose rows are the tile's columns: 16 of its rows, and of its
    // columns the warpgroup's 64 from col on.
    template <class Tile>
    __device__ __forceinline__ static void put_transposed(const Tile& tile, int row0, int col,
                                                          const Left& left) {
        const int lane = lane_index(), warp = static_cast<int>(threadIdx.x) / 32 % 4;
        stmatrix_x4_trans(tile.at(row0 + lane / 16 * 8 + lane % 8,
                                  col + 16 * warp + lane / 8 % 2 * 8),
                          left.r);
    }

    // dq = ds k, of this warpgroup's part.
    __device__ __forceinline__ void multiply_for_dq(Dq& dq, const typename Tiles::Slope& slopes,
                                                    const typename Tiles::Key& keys) const {
        const int row0 = Tiles::kByRows ? 64 * consumer : 0;
        const int col = Tiles::kByRows ? 0 : kPanelCols * Tiles::kDqPasses * consumer;
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < kKeys; j += 16)
            Wgmma<T, 8 * kDqTiles, Major::k, Major::mn>::multiply(
                dq, slopes.k_major(row0, j), keys.mn_major(j, col), j > 0);
        wgmma_commit();
    }

    // To the warp that adds it up, pass by pass.
    __device__ __forceinline__ void pass_dq(const Dq& dq) const {
        constexpr int kCols8 = Tiles::kDqCols / 8;
        float* part = reinterpret_cast<float*>(arena + Tiles::kDq) + consumer * Tiles::kDqPart +
                      threadIdx.x % 128 * 4;
#pragma unroll
        for (int pass = 0; pass < Tiles::kDqPasses; ++pass) {
            named_barrier_sync(kDqEmpty + consumer, 128 + 32);
#pragma unroll
            for (int n = 0; n < kCols8; ++n) {
                const float(&four)[4] = dq[pass * kCols8 + n];
                st128_shared(part + n * 128 * 4,
                             Pack<float, 4>{{four[0], four[1], four[2], four[3]}});
            }
            fence_proxy_async();
            named_barrier_arrive(kDqFull + consumer, 128 + 32);
        }
    }

    // Panels of dk or dv in shared memory, where k or v was, to memory. The warpgroup's threads
    // have written them, rows row0 ... of panels first ... last - 1.
    __device__ __forceinline__ void store_panels(const TensorMap* map, int offset, int row0,
                                                 int first, int last) const {
        const auto tile = key_tile(offset);
        fence_proxy_async();
        named_barrier_sync(kOwn + consumer, 128);
        if (threadIdx.x % 128 != 0) return;
        for (int panel = first; panel < last; ++panel)
            tma_store(map, tile.at(row0, panel * kPanelCols),
                      Coordinates<4>{{panel * kPanelCols, work.hk, work.j0 + row0, work.b}});
        bulk_commit();
    }
};

// acc = 0 where column 8 n + c of the accumulators is not first ... last, for the rows of one half.
template <int kTiles>
__device__ __forceinline__ void select_columns(float (&acc)[kTiles][4], int half, int first,
                                               int last) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c)
            if (8 * n + c < first || 8 * n + c > last) acc[n][2 * half + c] = 0;
}

template <int kTiles>
__device__ __forceinline__ bool all_finite(const float (&acc)[kTiles][4]) {
    bool finite = true;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) finite = finite && is_finite(acc[n][e]);
    return finite;
}

template <int kTiles>
__device__ __forceinline__ void clear_all(float (&acc)[kTiles][4]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[n][e] = 0;
}

template <int kTiles>
__device__ __forceinline__ void multiply_by(float (&acc)[kTiles][4], float factor) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[n][e] *= factor;
}

}  // namespace gk
