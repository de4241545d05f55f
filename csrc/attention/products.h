// How a warp of attention's forward kernels processes its rows with mma.sync: s = q k^T, a step of
// the online softmax, o += p v.
//
// `Tiles` holds the sizes: kRowTiles, the number of tiles of 16 rows that a warp owns; kKeys, the
// keys of a block; kWidth, the width of a head; kHalf, whether elements have 16 bits; kFenced,
// whether registers are short; Query and Key, the types of the tiles in shared memory.
#pragma once

#include "attention/scores.h"
#include "device/exp2.h"
#include "device/mma.h"
#include "device/tile.h"
#include "runtime/launch.h"

namespace gk {

// s = q k^T for this warp's rows.
template <class Tiles, class T>
__device__ __forceinline__ void score_products(float (&s)[Tiles::kRowTiles][Tiles::kKeys / 8][4],
                                               const typename Tiles::Query& q_tile,
                                               const typename Tiles::Key& k_tile, int row0) {
    using M = Mma<T>;
#pragma unroll
    for (int r = 0; r < Tiles::kRowTiles; ++r)
#pragma unroll
        for (int n = 0; n < Tiles::kKeys / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) s[r][n][e] = 0;
    // The fp32 loop is not unrolled: thousands of FFMAs in a row gain nothing, and they cost ptxas
    // half a minute.
    [[maybe_unused]] constexpr int kUnrolled = Tiles::kHalf ? Tiles::kWidth / M::K : 1;
#pragma unroll kUnrolled
    for (int d = 0; d < Tiles::kWidth; d += M::K) {
        typename M::A q[Tiles::kRowTiles];
#pragma unroll
        for (int r = 0; r < Tiles::kRowTiles; ++r) load_a(q[r], q_tile, row0 + 16 * r, d);
#pragma unroll
        for (int n = 0; n < Tiles::kKeys; n += 16) {
            typename M::B k[2];
            load_b(k, k_tile, n, d);
#pragma unroll
            for (int r = 0; r < Tiles::kRowTiles; ++r) {
                M::multiply(s[r][n / 8], q[r], k[0]);
                M::multiply(s[r][n / 8 + 1], q[r], k[1]);
            }
        }
    }
}

// o += p v for this warp's rows. p is rounded to T one fragment at a time.
template <class Tiles, class T>
__device__ __forceinline__ void value_products(
    float (&o)[Tiles::kRowTiles][Tiles::kWidth / 8][4],
    const float (&p)[Tiles::kRowTiles][Tiles::kKeys / 8][4], const typename Tiles::Key& v_tile) {
    using M = Mma<T>;
#pragma unroll
    for (int j = 0; j < Tiles::kKeys; j += M::K) {
        typename M::A weights[Tiles::kRowTiles];
#pragma unroll
        for (int r = 0; r < Tiles::kRowTiles; ++r)
            weights[r] = M::from_accumulators(&p[r][j / 8]);
#pragma unroll
        for (int d = 0; d < Tiles::kWidth; d += 16) {
            // This fence keeps ptxas from loading fragments ahead, for which no registers are left.
            if (Tiles::kFenced) __syncwarp();
            typename M::B v[2];
            load_b_transposed(v, v_tile, j, d);
#pragma unroll
            for (int r = 0; r < Tiles::kRowTiles; ++r) {
                M::multiply(o[r][d / 8], weights[r], v[0]);
                M::multiply(o[r][d / 8 + 1], weights[r], v[1]);
            }
        }
    }
}

// The running maximum (in log2 units) and the running sum of a thread's two rows in a row tile.
// Until the end the sum covers only the thread's own columns.
struct RowState {
    float m[2], l[2];
};

// s becomes p = exp2(factor s - m'); state and o are rescaled to the new maximum m'.
template <class T, int kTiles, int kOutTiles>
__device__ __forceinline__ void softmax_step(float (&s)[kTiles][4], float (&o)[kOutTiles][4],
                                             RowState& state, float factor) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float highest = -INFINITY;
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
            highest = fmaxf(highest, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
        const float m = fmaxf(state.m[half], highest * factor);
        // A row that has met no key yet subtracts 0, so that its weights are exp2(-inf) = 0.
        const float used = m == -INFINITY ? 0.0f : m;
        const float rescale = exp2_for<T>(state.m[half] - used);
        state.m[half] = m;
        float sum = 0;
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const float p = exp2_for<T>(fmaf(s[n][2 * half + c], factor, -used));
                s[n][2 * half + c] = p;
                sum += p;
            }
        state.l[half] = fmaf(state.l[half], rescale, sum);
#pragma unroll
        for (int d = 0; d < kOutTiles; ++d)
#pragma unroll
            for (int c = 0; c < 2; ++c) o[d][2 * half + c] *= rescale;
    }
}

// Replaces NaN and Inf in a tile by 0. The kThreads neighbouring threads that share the tile call
// this together.
template <int kThreads, class T, int kTileRows, int kTileCols>
__device__ void zero_nonfinite(const SharedTile<T, kTileRows, kTileCols>& tile) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) % kThreads; i < kTileRows * kTileCols; i += kThreads)
        if (!is_finite(to_float(tile.data[i]))) tile.data[i] = from_float<T>(0.0f);
}

}  // namespace gk
