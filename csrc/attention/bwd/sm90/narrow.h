// Attention backward on Hopper, heads up to 128 wide: each warpgroup computes dk and dv of 64 keys.
// See attention/bwd/sm90/kernel.h.
//
//     s^T = k q^T, dp^T = v dout^T     64 keys by the step's queries
//     dv += p^T dout, dk += ds^T q     p^T, ds^T from the registers, where they are left operands
//     dq = ds k                        ds through shared memory: each warpgroup has 64 of its keys
//
// The products are issued in the order s, dp, dv, dq, dk, and each result is waited for as late as
// possible: the weights are computed while dp's product runs, ds while dv's product runs (if dv's
// is issued early), and dq goes to shared memory while dk's product runs.
#pragma once

#include "attention/bwd/sm90/consumer.h"

namespace gk {

template <class T, class Tiles, bool kOptions>
struct BwdNarrow : BwdConsumer<T, Tiles> {
    using Base = BwdConsumer<T, Tiles>;
    using Base::a, Base::arena, Base::consumer, Base::kRows, Base::kWidth, Base::pair, Base::row,
        Base::work;
    static constexpr int kRowTiles = kRows / 8;
    using Scores = float[kRowTiles][4];     // s^T, dp^T
    using Gradient = float[kWidth / 8][4];  // dk, dv
    using Lefts = typename Base::Left[kRows / 16];
    static constexpr bool kEarly = Tiles::kBuilt.early && !kOptions;

    Gradient dk, dv;

    // acc = this warpgroup's rows of left right^T.
    __device__ __forceinline__ void multiply_across(Scores& acc, const typename Tiles::Key& left,
                                                    const typename Tiles::Query& right) const {
        wgmma_fence();
#pragma unroll
        for (int d = 0; d < kWidth; d += 16)
            Wgmma<T, kRows>::multiply(acc, left.k_major(64 * consumer, d), right.k_major(0, d),
                                      d > 0);
        wgmma_commit();
    }

    // acc += left tile.
    __device__ __forceinline__ static void multiply_along(Gradient& acc, const Lefts& left,
                                                          const typename Tiles::Query& tile) {
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kRows; i += 16)
            Wgmma<T, kWidth, Major::k, Major::mn>::multiply(acc, left[i / 16].r,
                                                            tile.mn_major(i, 0), true);
        wgmma_commit();
    }

    __device__ __forceinline__ static void round(Lefts& to, const Scores& from) {
#pragma unroll
        for (int i = 0; i < kRows / 16; ++i) to[i] = Mma<T>::from_accumulators(&from[2 * i]);
    }

    // The values for the thread's two columns in the nth group of 8.
    __device__ __forceinline__ float2 two(const float* of_rows, int n) const {
        return *reinterpret_cast<const float2*>(of_rows + 8 * n + pair);
    }

    // Clears the elements of pairs that do not see each other. i: the query of the thread's first
    // column.
    __device__ __forceinline__ void select_seen(Scores& acc, int i) const {
        const Band& band = work.band;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int j = work.j0 + 64 * consumer + row + 8 * half;
            const int last = j < band.count ? j - band.shift + band.left - i : INT_MIN;
            select_columns(acc, half, j - band.shift - band.right - i, last);
        }
    }

    // s becomes p.
    __device__ __forceinline__ void weigh(Scores& s, const float* lse, float factor) const {
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
            const float2 l = two(lse, n);
#pragma unroll
            for (int e = 0; e < 4; ++e)
                s[n][e] = exp2_for<T>(fmaf(s[n][e], factor, -(e % 2 ? l.y : l.x)));
        }
    }

    // dp becomes ds.
    __device__ __forceinline__ void slope(Scores& dp, const Scores& p, const float* delta) const {
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
            const float2 d = two(delta, n);
#pragma unroll
            for (int e = 0; e < 4; ++e) dp[n][e] = p[n][e] * (dp[n][e] - (e % 2 ? d.y : d.x));
        }
    }

    // Computes both p and ds, with a softcap or ALiBi.
    __device__ __forceinline__ void weigh_and_slope(Scores& s, Scores& dp, const float* lse,
                                                    const float* delta, const Score& score,
                                                    int i) const {
        const int distance = i + work.band.shift - (work.j0 + 64 * consumer + row);
#pragma unroll
        for (int n = 0; n < kRowTiles; ++n) {
            const float2 l = two(lse, n), d = two(delta, n);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float slope_of_cap;
                const float x =
                    score(s[n][e], distance + 8 * n + e % 2 - e / 2 * 8, slope_of_cap);
                s[n][e] = exp2_for<T>(fmaf(x, kLog2e, -(e % 2 ? l.y : l.x)));
                dp[n][e] = s[n][e] * slope_of_cap * (dp[n][e] - (e % 2 ? d.y : d.x));
            }
        }
    }

    __device__ __forceinline__ void run() {
        const BwdBarriers<Tiles> bars(arena);
        const int steps = work.steps();
        const auto k_tile = this->key_tile(0), v_tile = this->key_tile(Tiles::kV);
        PipelineState<kBwdSlots> q;
        PipelineState<Tiles::kDoutStages> dout;
        BwdStep at(work);
        Score score = score_of_head(a.p.call, work.b, at.h);
        int of_head = at.h;
        clear_all(dk);
        clear_all(dv);
        if (steps > 0) this->wait_for_keys(bars);
#pragma unroll 1
        for (int step = 0; step < steps; ++step, at.advance(), q.advance(), dout.advance()) {
            const int i0 = at.row_block * kRows;
            const bool masked = work.queries.needs_mask(i0, kRows);
            const auto q_tile = this->query_tile(Tiles::kQ, q.stage);
            const auto dout_tile = this->query_tile(Tiles::kDout, dout.stage);
            const auto slopes_tile = this->slope_tile(q.stage);
            const float* lse = this->stats(q.stage);
            const float* delta = lse + kRows;
            if (kOptions && at.h != of_head) {
                score = score_of_head(a.p.call, work.b, at.h);
                of_head = at.h;
            }

            Scores s, dp;
            Lefts p_left, ds_left;
            mbarrier_wait(bars.q_full(q.stage), q.phase);
            multiply_across(s, k_tile, q_tile);
            if (step == 0) mbarrier_wait(bars.v(), 0);
            mbarrier_wait(bars.dout_full(dout.stage), dout.phase);
            multiply_across(dp, v_tile, dout_tile);

            if constexpr (kOptions) {
                wgmma_wait<0>();
                wgmma_fence_registers(s);
                wgmma_fence_registers(dp);
                weigh_and_slope(s, dp, lse, delta, score, i0 + pair);
                if (masked) select_seen(s, i0 + pair);
            } else {
                wgmma_wait<1>();
                wgmma_fence_registers(s);
                weigh(s, lse, score.factor);
                if (masked) select_seen(s, i0 + pair);
                if constexpr (kEarly) {
                    round(p_left, s);
                    multiply_along(dv, p_left, dout_tile);
                    wgmma_wait<1>();
                } else {
                    wgmma_wait<0>();
                }
                wgmma_fence_registers(dp);
                slope(dp, s, delta);
            }
            if (masked) select_seen(dp, i0 + pair);
            round(ds_left, dp);
#pragma unroll
            for (int i = 0; i < kRows; i += 16)
                Base::put_transposed(slopes_tile, i, 64 * consumer, ds_left[i / 16]);
            if constexpr (!kEarly) {
                round(p_left, s);
                multiply_along(dv, p_left, dout_tile);
            }
            fence_proxy_async();
            // All of ds is there now. The ds of two steps ago in the same tile has been read: a
            // thread that comes here has waited for the last step's dq.
            named_barrier_sync(kSlopesThere, Tiles::kConsumerThreads);

            typename Base::Dq dq;
            this->multiply_for_dq(dq, slopes_tile, k_tile);
            wgmma_wait<1>();  // until dv is there
            Base::release(bars.dout_empty(dout.stage));
            multiply_along(dk, ds_left, q_tile);
            wgmma_wait<1>();  // until dq is there
            wgmma_fence_registers(dq);
            this->pass_dq(dq);
            wgmma_wait<0>();  // until dk is there
            Base::release(bars.q_empty(q.stage));
        }
        wgmma_fence_registers(dk);
        wgmma_fence_registers(dv);
        multiply_by(dk, a.p.call.softmax_scale);
    }

    __device__ bool finite() const { return all_finite(dk) && all_finite(dv); }

    // Stores the rows of this warpgroup's 64 keys.
    __device__ __forceinline__ void store(const Gradient& gradient, int offset,
                                          const TensorMap* map) const {
        const auto tile = this->key_tile(offset);
        const int lane = lane_index(), warp = static_cast<int>(threadIdx.x) / 32 % 4;
#pragma unroll
        for (int n = 0; n < kWidth / 8; n += 2)
            stmatrix_x4(tile.at(64 * consumer + 16 * warp + lane % 16, 8 * n + lane / 16 * 8),
                        Mma<T>::from_accumulators(&gradient[n]).r);
        this->store_panels(map, offset, 64 * consumer, 0, Tiles::Key::kPanels);
    }

    __device__ __forceinline__ void store() const {
        if (a.p.dv != nullptr) store(dv, Tiles::kV, &a.dv);  // rows that no other warpgroup reads
        // The other warpgroups may still read k, for their last dq.
        named_barrier_sync(kSlopesThere, Tiles::kConsumerThreads);
        if (a.p.dk != nullptr) store(dk, 0, &a.dk);
    }
};

}  // namespace gk
