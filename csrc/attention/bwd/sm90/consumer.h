// Attention backward on Hopper, main kernel: what the warpgroups that multiply share, however they
// divide dk and dv. See attention/bwd/sm90/kernel.h.
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
    int row;   // the thread's first row of a warpgroup's 64; the second is row + 8
    int pair;  // its first column of each 8; the second is pair + 1

    __device__ typename Tiles::Key key_tile(int offset) const {
        return {reinterpret_cast<T*>(arena + offset)};
    }
    __device__ typename Tiles::Query query_tile(int offset, int stage) const {
        return {reinterpret_cast<T*>(arena + offset + stage * Tiles::Query::kBytes)};
    }
    __device__ typename Tiles::Slope slope_tile(int stage) const {
        return {reinterpret_cast<T*>(arena + Tiles::kSlope + stage * Tiles::Slope::kBytes)};
    }
    // The statistics of a stage's rows: lse, then delta.
    __device__ const float* stats(int stage) const {
        return reinterpret_cast<const float*>(arena + Tiles::kStats + stage * Tiles::kStatsBytes);
    }

    // Says that this warp is done with a stage.
    __device__ __forceinline__ static void release(uint64_t* bar) {
        __syncwarp();
        if (lane_index() == 0) mbarrier_arrive(bar);
    }

    // Waits for k. Keys past the length of their batch entry may hold NaN, and 0 * NaN in the
    // product for dq would be NaN, so these keys are cleared. TMA clears keys past Tk.
    __device__ void wait_for_keys(const BwdBarriers<Tiles>& bars) const {
        mbarrier_wait(bars.k(), 0);
        const int valid = work.band.count - work.j0;
        if (valid >= kKeys || work.band.count == a.p.call.Tk) return;
        mbarrier_wait(bars.v(), 0);
        constexpr int kChunks = Tiles::Key::kCols / 8;
        for (int i = valid * kChunks + static_cast<int>(threadIdx.x) - 128; i < kKeys * kChunks;
             i += Tiles::kConsumerThreads) {
            st128_shared(key_tile(0).at(i / kChunks, i % kChunks * 8), Pack<T, 8>{});
            st128_shared(key_tile(Tiles::kV).at(i / kChunks, i % kChunks * 8), Pack<T, 8>{});
        }
        fence_proxy_async();
        named_barrier_sync(kSlopesThere, Tiles::kConsumerThreads);
    }

    // Stores 16 columns of p or ds, from col on; the tile's rows are queries.
    __device__ __forceinline__ static void put(const typename Tiles::Slope& tile, int col,
                                               const Left& left) {
        const int lane = lane_index(), warp = static_cast<int>(threadIdx.x) / 32 % 4;
        stmatrix_x4(tile.at(16 * warp + lane % 16, col + lane / 16 * 8), left.r);
    }

    // Stores accumulators whose rows are the tile's columns: 16 rows of the tile, and the
    // warpgroup's 64 columns from col on.
    template <class Tile>
    __device__ __forceinline__ static void put_transposed(const Tile& tile, int row0, int col,
                                                          const Left& left) {
        const int lane = lane_index(), warp = static_cast<int>(threadIdx.x) / 32 % 4;
        stmatrix_x4_trans(tile.at(row0 + lane / 16 * 8 + lane % 8,
                                  col + 16 * warp + lane / 8 % 2 * 8),
                          left.r);
    }

    // dq = ds k, for this warpgroup's part of dq.
    __device__ __forceinline__ void multiply_for_dq(Dq& dq, const typename Tiles::Slope& slopes,
                                                    const typename Tiles::Key& keys) const {
        const int row0 = Tiles::kByRows ? 64 * consumer : 0;
        const int col = Tiles::kByRows ? 0 : kKeyPanelCols * Tiles::kDqPasses * consumer;
        wgmma_fence();
#pragma unroll
        for (int j = 0; j < kKeys; j += 16)
            Wgmma<T, 8 * kDqTiles, Major::k, Major::mn>::multiply(
                dq, slopes.k_major(row0, j), keys.mn_major(j, col), j > 0);
        wgmma_commit();
    }

    // Passes dq, in kDqPasses parts, to the warp that adds it up.
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

    // Stores the panels first ... last - 1 of dk or dv, which lie in shared memory where k or v
    // was. The warpgroup's threads have written these panels, in the rows from row0 on.
    __device__ __forceinline__ void store_panels(const TensorMap* map, int offset, int row0,
                                                 int first, int last) const {
        const auto tile = key_tile(offset);
        fence_proxy_async();
        named_barrier_sync(kOwn + consumer, 128);
        if (threadIdx.x % 128 != 0) return;
        for (int panel = first; panel < last; ++panel)
            tma_store(map, tile.at(row0, panel * kKeyPanelCols),
                      Coordinates<4>{{panel * kKeyPanelCols, work.hk, work.j0 + row0, work.b}});
        bulk_commit();
    }
};

// Sets acc to 0 where column 8 n + c of the accumulators is outside first ... last, for the rows of
// one half.
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
