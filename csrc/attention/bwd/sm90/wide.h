// Attention backward on Hopper, heads 192 and 256 wide: each warpgroup computes 64 or 128 columns
// of dk and dv, for all keys. See attention/bwd/sm90/kernel.h.
//
//     s = q k^T, dp = dout v^T           the step's 64 queries by a share of the keys
//     dv^T += dout^T p, dk^T += q^T ds   p and ds through shared memory, as their keys are shared
//     dq = ds k                          through shared memory to the warp that adds it up
//
// The products are issued in the order s, dp, dv, dq, dk; dq goes to shared memory while dk's runs.
#pragma once

#include "attention/bwd/sm90/consumer.h"

namespace gk {

template <class T, class Tiles, bool kOptions>
struct BwdWide : BwdConsumer<T, Tiles> {
    using Base = BwdConsumer<T, Tiles>;
    using Base::a, Base::arena, Base::consumer, Base::kKeys, Base::kWidth, Base::pair, Base::row,
        Base::work;
    static constexpr int kShare = kKeys / Tiles::kConsumers;  // keys of s, for each warpgroup
    static constexpr int kPanels = Tiles::kDqPasses;          // of columns, for each warpgroup
    static_assert(kShare % 16 == 0, "whole stores of p and ds");
    using Scores = float[kShare / 8][4];
    using Gradient = float[kPanels][kKeys / 8][4];  // dk^T, dv^T

    Gradient dk, dv;

    // acc = left right^T, for this warpgroup's rows of right.
    __device__ __forceinline__ void multiply_across(Scores& acc, const typename Tiles::Query& left,
                                                    const typename Tiles::Key& right) const {
        wgmma_fence();
#pragma unroll
        for (int d = 0; d < kWidth; d += 16)
            Wgmma<T, kShare>::multiply(acc, left.k_major(0, d),
                                       right.k_major(kShare * consumer, d), d > 0);
        wgmma_commit();
    }

    // acc += left^T right, for this warpgroup's columns of left.
    __device__ __forceinline__ void multiply_along(Gradient& acc, const typename Tiles::Query& left,
                                                   const typename Tiles::Slope& right) const {
        wgmma_fence();
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel)
#pragma unroll
            for (int i = 0; i < Tiles::kRows; i += 16)
                Wgmma<T, kKeys, Major::mn, Major::mn>::multiply(
                    acc[panel], left.mn_major(i, kKeyPanelCols * (kPanels * consumer + panel)),
                    right.mn_major(i, 0), true);
        wgmma_commit();
    }

    // Clears the elements of pairs that do not see each other.
    __device__ __forceinline__ void select_seen(Scores& acc, int i0) const {
        const int j = work.j0 + kShare * consumer + pair;  // of the thread's first column
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = i0 + row + 8 * half;
            select_columns(acc, half, work.band.lowest(i) - j, work.band.highest(i) - j);
        }
    }

    __device__ __forceinline__ static void put(const typename Tiles::Slope& tile, int col0,
                                               const Scores& values) {
#pragma unroll
        for (int n = 0; n < kShare / 8; n += 2)
            Base::put(tile, col0 + 8 * n, Mma<T>::from_accumulators(&values[n]));
    }

    __device__ __forceinline__ void run() {
        const BwdBarriers<Tiles> bars(arena);
        const int steps = work.steps();
        const auto k_tile = this->key_tile(0), v_tile = this->key_tile(Tiles::kV);
        const auto p_tile = this->slope_tile(0), slopes_tile = this->slope_tile(1);
        PipelineState<kBwdSlots> q;
        PipelineState<Tiles::kDoutStages> dout;
        BwdStep at(work);
        Score score = score_of_head(a.p.call, work.b, at.h);
        int of_head = at.h;
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
            clear_all(dk[panel]);
            clear_all(dv[panel]);
        }
        if (steps > 0) this->wait_for_keys(bars);
#pragma unroll 1
        for (int step = 0; step < steps; ++step, at.advance(), q.advance(), dout.advance()) {
            const int i0 = at.row_block * Tiles::kRows;
            const auto q_tile = this->query_tile(Tiles::kQ, q.stage);
            const auto dout_tile = this->query_tile(Tiles::kDout, dout.stage);
            const float* lse = this->stats(q.stage) + row;
            const float* delta = lse + Tiles::kRows;
            if (kOptions && at.h != of_head) {
                score = score_of_head(a.p.call, work.b, at.h);
                of_head = at.h;
            }

            Scores s, dp;
            mbarrier_wait(bars.q_full(q.stage), q.phase);
            multiply_across(s, q_tile, k_tile);
            if (step == 0) mbarrier_wait(bars.v(), 0);
            mbarrier_wait(bars.dout_full(dout.stage), dout.phase);
            multiply_across(dp, dout_tile, v_tile);
            weigh_and_slope(s, dp, lse, delta, score, i0);
            if (work.queries.needs_mask(i0, Tiles::kRows)) {
                select_seen(s, i0);
                select_seen(dp, i0);
            }
            // The last step's p and ds have been read: a thread that comes here has waited for
            // their products.
            named_barrier_sync(kSlopesRead, Tiles::kConsumerThreads);
            put(p_tile, kShare * consumer, s);
            put(slopes_tile, kShare * consumer, dp);
            fence_proxy_async();
            named_barrier_sync(kSlopesThere, Tiles::kConsumerThreads);

            multiply_along(dv, dout_tile, p_tile);
            typename Base::Dq dq;
            this->multiply_for_dq(dq, slopes_tile, k_tile);
            wgmma_wait<1>();  // until dv is there
            Base::release(bars.dout_empty(dout.stage));
            multiply_along(dk, q_tile, slopes_tile);
            wgmma_wait<1>();  // until dq is there
            wgmma_fence_registers(dq);
            this->pass_dq(dq);
            wgmma_wait<0>();  // until dk is there
            Base::release(bars.q_empty(q.stage));
        }
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
            wgmma_fence_registers(dk[panel]);
            wgmma_fence_registers(dv[panel]);
            multiply_by(dk[panel], a.p.call.softmax_scale);
        }
    }

    // s becomes p while dp's product runs, then dp becomes ds.
    __device__ __forceinline__ void weigh_and_slope(Scores& s, Scores& dp, const float* lse,
                                                    const float* delta, const Score& score,
                                                    int i0) const {
        const int distance = i0 + row + work.band.shift - (work.j0 + kShare * consumer + pair);
        wgmma_wait<1>();
        wgmma_fence_registers(s);
        const float factor = kOptions ? kLog2e : score.factor;
        float cap[kOptions ? kShare / 8 : 1][4];
#pragma unroll
        for (int n = 0; n < kShare / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if constexpr (kOptions)
                    s[n][e] = score(s[n][e], distance + e / 2 * 8 - 8 * n - e % 2, cap[n][e]);
                s[n][e] = exp2_for<T>(fmaf(s[n][e], factor, -lse[e / 2 * 8]));
            }
        wgmma_wait<0>();
        wgmma_fence_registers(dp);
#pragma unroll
        for (int n = 0; n < kShare / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                dp[n][e] = s[n][e] * (dp[n][e] - delta[e / 2 * 8]);
                if constexpr (kOptions) dp[n][e] *= cap[n][e];
            }
    }

    __device__ bool finite() const {
        bool all = true;
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel)
            all = all && all_finite(dk[panel]) && all_finite(dv[panel]);
        return all;
    }

    // Stores this warpgroup's panels, for all keys.
    __device__ __forceinline__ void store(const Gradient& gradient, int offset,
                                          const TensorMap* map) const {
        const int first = kPanels * consumer;
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel)
#pragma unroll
            for (int n = 0; n < kKeys / 8; n += 2)
                Base::put_transposed(this->key_tile(offset), 8 * n, kKeyPanelCols * (first + panel),
                                     Mma<T>::from_accumulators(&gradient[panel][n]));
        this->store_panels(map, offset, 0, first, first + kPanels);
    }

    __device__ __forceinline__ void store() const {
        // The other warpgroups may still read k and v.
        named_barrier_sync(kSlopesThere, Tiles::kConsumerThreads);
        if (a.p.dv != nullptr) store(dv, Tiles::kV, &a.dv);
        if (a.p.dk != nullptr) store(dk, 0, &a.dk);
    }
};

}  // namespace gk
