// Attention forward on Hopper's tensor cores (Dao, Shah et al., "FlashAttention-3", 2024): online
// softmax as in attention/fwd/kernel.h, but loads, products and softmax of different blocks
// overlap.
//
// q (B, Tq, H, D), k and v (B, Tk, Hk, D) -> out (B, Tq, H, D), lse (B, H, Tq) fp32. Moves q and
// out once, k and v once for each tile of Tiles::kRows queries, mostly from L2; scores never leave
// the registers. Saved for the backward pass: q, k, v, out in their dtype, and lse.
//
// A CTA stays on its multiprocessor and takes one tile after another. One thread of its first
// warpgroup loads q, k and v by the tensor memory accelerator (TMA), k and v into rings of two
// stages; the other warpgroups are consumers with 64 queries each. The blocks of keys are visited
// from right to left, so that blocks with a mask come first and the loop over the rest has none. A
// consumer issues the scores of a block, then the value product of the block before it, and
// computes the softmax while the value product runs. With ping-pong the consumers also take turns,
// so that the softmax of one consumer runs under the products of another.
//
// A weight is 0 where a row does not see a key, but 0 * NaN is NaN: NaN or Inf in v would reach
// rows that do not see it. Values past a length are zeroed in shared memory. Elsewhere such a row
// shows NaN in o, and is computed again as attention/fwd/sm90/again.h says.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention/fwd/sm90/again.h"
#include "attention/fwd/sm90/load.h"
#include "attention/fwd/sm90/softmax.h"
#include "attention/row_end.h"
#include "device/stmatrix.h"
#include "device/tma.h"
#include "device/warpgroup.h"
#include "device/wgmma.h"

namespace gk {

// Named barriers: one for each consumer's turn at the tensor cores, one for the four warps of each
// consumer, and one for all consumers. Barrier 0 is that of __syncthreads.
constexpr unsigned kTurnBarrier = 1, kOwnBarrier = 4, kConsumersBarrier = 7;

// Issues s = q k^T without waiting for the result.
template <class Tiles>
__device__ __forceinline__ void issue_scores(float (&s)[Tiles::kKeys / 8][4],
                                             typename Tiles::Query q, typename Tiles::Key k) {
    wgmma_fence_registers(s);
    wgmma_fence();
#pragma unroll
    for (int d = 0; d < Tiles::kWidth; d += 16)
        Wgmma<typename Tiles::Type, Tiles::kKeys>::multiply(s, q.k_major(0, d), k.k_major(0, d),
                                                            d > 0);
    wgmma_commit();
}

// Issues o += p v without waiting for the result.
template <class Tiles>
__device__ __forceinline__ void issue_values(float (&o)[Tiles::kWidth / 8][4],
                                             const typename Tiles::Weights (&p)[Tiles::kKeys / 16],
                                             typename Tiles::Key v) {
    using Product = Wgmma<typename Tiles::Type, Tiles::kWidth, Major::k, Major::mn>;
    wgmma_fence_registers(o);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < Tiles::kKeys; j += 16)
        Product::multiply(o, p[j / 16].r, v.mn_major(j, 0), true);
    wgmma_commit();
}

// Rounds p to the left operand of the value product. The accumulators already have its layout.
template <class T, int kTiles>
__device__ __forceinline__ void round_weights(typename Mma<T>::A (&p)[kTiles / 2],
                                              const float (&s)[kTiles][4]) {
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) p[n / 2] = Mma<T>::from_accumulators(&s[n]);
}

// Finds which of a thread's two rows hold a value that is not finite, though the sum l of their
// weights is: where it is not, neither is the score of a key that the row sees, and all of the row
// is NaN. lost[half] has one bit for each lane of the warp; the four neighbouring lanes of a quad
// share a row.
template <int kTiles>
__device__ __forceinline__ void lost_rows(unsigned (&lost)[2], const float (&o)[kTiles][4],
                                          const float (&l)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float zero = 0;  // becomes NaN where a value is not finite
#pragma unroll
        for (int d = 0; d < kTiles; ++d)
#pragma unroll
            for (int c = 0; c < 2; ++c) zero = fmaf(o[d][2 * half + c], 0.0f, zero);
        lost[half] = __ballot_sync(0xffffffffu, zero != 0 && is_finite(l[half]));
    }
}

// The index of a warpgroup in its CTA, as a value that the compiler knows to be the same in all
// lanes.
__device__ __forceinline__ int warpgroup_index() {
    return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
}

// A consumer: one of the warpgroups that multiply.
template <class Tiles, bool kOptions>
struct FwdSm90Consumer {
    using T = typename Tiles::Type;
    static constexpr int kKeys = Tiles::kKeys, kWidth = Tiles::kWidth;

    const FwdSm90Arguments& a;
    const FwdSm90Shared<Tiles>& shared;
    int consumer;
    PipelineState<kFwdSm90Stages> k_at, v_at;

    static __device__ int warp() { return static_cast<int>(threadIdx.x) % kWarpgroup / 32; }
    static __device__ int lane() { return static_cast<int>(threadIdx.x) % 32; }

    __device__ __forceinline__ void take_turn() const {
        if (Tiles::kPingPong) named_barrier_sync(kTurnBarrier + consumer, 2 * kWarpgroup);
    }
    __device__ __forceinline__ void pass_turn() const {
        const int next = consumer + 1 == Tiles::kConsumers ? 0 : consumer + 1;
        if (Tiles::kPingPong) named_barrier_arrive(kTurnBarrier + next, 2 * kWarpgroup);
    }
    __device__ __forceinline__ void release(uint64_t* bar) const {
        if (lane() == 0) mbarrier_arrive(bar);
    }
    __device__ __forceinline__ void release_k() {
        release(shared.k_empty(k_at.stage));
        k_at.advance();
    }
    __device__ __forceinline__ void release_v() {
        release(shared.v_empty(v_at.stage));
        v_at.advance();
    }

    // Waits for v of the block at key j. Values past the length may be anything, so all consumers
    // together set them to 0. They lie in a tile's first block, which every consumer visits. (Other
    // values that a row does not see matter only where they are NaN or Inf, which is rare: see
    // lost_rows.)
    __device__ __forceinline__ void await_v(const Band& band, int j) const {
        mbarrier_wait(shared.v_full(v_at.stage), v_at.phase);
        if (band.count >= min(j + kKeys, a.p.call.Tk)) return;
        const auto v = shared.v(v_at.stage);
        constexpr int kRowChunks = kWidth / 8;
        const int first = (band.count - j) * kRowChunks;
        const int last = min(a.p.call.Tk - j, kKeys) * kRowChunks;
        const int thread = static_cast<int>(threadIdx.x) - kWarpgroup;
#pragma unroll 1
        for (int i = first + thread; i < last; i += Tiles::kConsumers * kWarpgroup)
            st128_shared(v.at(i / kRowChunks, i % kRowChunks * 8), Pack<T, 8>{});
        fence_proxy_async();
        named_barrier_sync(kConsumersBarrier, Tiles::kConsumers * kWarpgroup);
    }

    // Passes over a block that only other consumers see.
    __device__ __forceinline__ void pass_block(const Band& band, int j) {
        mbarrier_wait(shared.k_full(k_at.stage), k_at.phase);
        take_turn();
        pass_turn();
        release_k();
        await_v(band, j);
        release_v();
    }

    __device__ __forceinline__ void run() {
        if (consumer == Tiles::kConsumers - 1) pass_turn();
#pragma unroll 1
        for (unsigned turn = 0;; ++turn) {
            const FwdSm90Place place(a, turn, Tiles::kRows);
            if (!place.exists) break;
            consumer = warpgroup_index() - 1;  // recomputed: keeping it takes a register
            tile(place, turn % 2);
        }
        // Two things are outstanding: one last turn, and the accelerator may still be reading out's
        // tile.
        if (consumer == 0) take_turn();
        if (threadIdx.x % kWarpgroup == 0) bulk_wait_read<0>();
    }

    __device__ __forceinline__ void tile(const FwdSm90Place& place, unsigned q_phase) {
        const AttentionCall& call = a.p.call;
        const int i0 = place.i0 + consumer * kWarpgroupRows;
        const int i = i0 + 16 * warp() + lane() / 4, j_offset = 2 * (lane() % 4);
        const Band band = band_of(call, place.b);
        const float scale = call.softmax_scale;
        const Score score =
            kOptions ? score_of_head(call, place.b, place.h) : Score{scale, 0, 0, scale * kLog2e};
        const float factor = kOptions ? kLog2e : score.factor;
        // The blocks that the CTA loads, and the blocks among them that this consumer's rows see.
        const Range all = keys_of_tile(band, place.i0, Tiles::kRows, kKeys);
        const Range mine = keys_of_tile(band, i0, kWarpgroupRows, kKeys);

        float s[kKeys / 8][4], o[kWidth / 8][4], rescale[2];
        typename Tiles::Weights p[kKeys / 16];
        FwdSm90Rows rows{{-INFINITY, -INFINITY}, {0, 0}};
#pragma unroll
        for (int d = 0; d < kWidth / 8; ++d)
#pragma unroll
            for (int e = 0; e < 4; ++e) o[d][e] = 0;

        int j = last_block(all, kKeys);
#pragma unroll 1
        for (; j >= all.first && j >= mine.last; j -= kKeys) pass_block(band, j);
        mbarrier_wait(shared.q_full(consumer), q_phase);
        if (mine.last > mine.first) {
            const auto q = shared.q(consumer);
            mbarrier_wait(shared.k_full(k_at.stage), k_at.phase);
            take_turn();
            issue_scores<Tiles>(s, q, shared.k(k_at.stage));
            pass_turn();
            wgmma_wait<0>();
            wgmma_fence_registers(s);
            release_k();
            if (kOptions) apply_options<T>(s, score, band, i, j + j_offset);
            apply_mask(s, band, i, j + j_offset);
            softmax_block<T, true, true>(s, rows, rescale, factor);
            await_v(band, j);
            round_weights<T>(p, s);
            j -= kKeys;

            auto step = [&](auto masked) {
                constexpr bool kMasked = decltype(masked)::value;
                mbarrier_wait(shared.k_full(k_at.stage), k_at.phase);
                take_turn();
                issue_scores<Tiles>(s, q, shared.k(k_at.stage));
                if (Tiles::kRescaleFirst) {
                    // v has arrived long before. This wait keeps the compiler from moving the
                    // rescaling up among the products.
                    mbarrier_wait(shared.v_full(v_at.stage), v_at.phase);
                    rescale_rows(o, rescale);
                }
                issue_values<Tiles>(o, p, shared.v(v_at.stage));
                pass_turn();
                wgmma_wait<1>();
                wgmma_fence_registers(s);
                release_k();
                if (kOptions) apply_options<T>(s, score, band, i, j + j_offset);
                if (kMasked) apply_mask(s, band, i, j + j_offset);
                softmax_block<T, false, kMasked>(s, rows, rescale, factor);
                // Waits for this block's v, which the next product needs. This wait stands between
                // the softmax and the wait for the last product because it is a loop: ptxas would
                // move the wait for the product up, but not across a loop.
                const int used = v_at.stage;
                v_at.advance();
                mbarrier_wait(shared.v_full(v_at.stage), v_at.phase);
                wgmma_wait<0>();
                wgmma_fence_registers(o);
                release(shared.v_empty(used));
                round_weights<T>(p, s);
                if (!Tiles::kRescaleFirst) rescale_rows(o, rescale);
                j -= kKeys;
            };
            while (j >= mine.first) {
#pragma unroll 1
                while (j >= mine.first && mine.needs_mask(j, kKeys)) step(std::true_type());
                const int full_first = max(mine.first, mine.full_first);
#pragma unroll 1
                while (j >= full_first) step(std::false_type());
            }
            if (Tiles::kOutApart) release(shared.q_empty(consumer));
            if (Tiles::kRescaleFirst) rescale_rows(o, rescale);
            issue_values<Tiles>(o, p, shared.v(v_at.stage));
            wgmma_wait<0>();
            wgmma_fence_registers(o);
            release_v();
        } else if (Tiles::kOutApart) {
            release(shared.q_empty(consumer));
        }
#pragma unroll 1
        for (; j >= all.first; j -= kKeys) pass_block(band, j);
        store(place, i0, score, factor, rows, o);
    }

    // Stores out = o / l by way of shared memory, and lse.
    __device__ __forceinline__ void store(const FwdSm90Place& place, int i0, const Score& score,
                                          float factor, const FwdSm90Rows& rows,
                                          float (&o)[kWidth / 8][4]) {
        const AttentionCall& call = a.p.call;
        // Without `forget` the compiler would keep values that follow from the thread's number in
        // registers from one tile to the next, and the products need these registers.
        Pack<int, 1> number{{static_cast<int>(threadIdx.x)}};
        forget(number);
        const int consumer = number.at[0] / kWarpgroup - 1;
        const int lane = number.at[0] % 32, row0 = number.at[0] % kWarpgroup / 32 * 16;
        const bool leader = number.at[0] % kWarpgroup == 0;
        const auto out = shared.out(consumer);
        float l[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            l[half] = rows.l[half];
            l[half] += __shfl_xor_sync(0xffffffffu, l[half], 1);
            l[half] += __shfl_xor_sync(0xffffffffu, l[half], 2);
        }
        unsigned lost[2];
        lost_rows(lost, o, l);
        float* lse = a.p.lse + (static_cast<int64_t>(place.b) * call.H + place.h) * call.Tq;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = i0 + row0 + lane / 4 + 8 * half;
            const RowEnd end = row_end<T>(call, place.h, rows.m[half] * factor, l[half]);
            if (lane % 4 == 0 && i < call.Tq) lse[i] = end.lse;
#pragma unroll
            for (int d = 0; d < kWidth / 8; ++d)
#pragma unroll
                for (int c = 0; c < 2; ++c) o[d][2 * half + c] *= end.scale;
        }
        // Wait until the accelerator has read the last tile's out and, where out shares q's tile,
        // until all warps are done with q.
        if (Tiles::kOutApart && leader) bulk_wait_read<0>();
        named_barrier_sync(kOwnBarrier + consumer, kWarpgroup);
#pragma unroll
        for (int d = 0; d < kWidth; d += 16) {
            const auto rounded = Mma<T>::from_accumulators(&o[d / 8]);
            stmatrix_x4(out.at(row0 + lane % 16, d + lane / 16 * 8), rounded.r);
        }
        if ((lost[0] | lost[1]) != 0 && i0 + row0 < call.Tq) {
            // The band is looked up again, since the main loop has no registers to keep it.
            Pack<int, 1> entry{{place.b}};
            forget(entry);
            const Band own = band_of(call, entry.at[0]);
            const FwdSm90Again<Tiles> again{a, own, entry.at[0], place.h, i0 + row0};
            __syncwarp();
            if (again.needed(keys_of_tile(own, i0, kWarpgroupRows, kKeys)))
                again.attend(score, lost, out, row0);
        }
        fence_proxy_async();
        named_barrier_sync(kOwnBarrier + consumer, kWarpgroup);
        if (leader) {
            if (i0 < call.Tq) {
#pragma unroll
                for (int panel = 0; panel < Tiles::Query::kPanels; ++panel)
                    tma_store(&a.out, out.panel(panel),
                              Coordinates<4>{{panel * Tiles::Query::kPanelCols, place.h, i0,
                                              place.b}});
                bulk_commit();
            }
            if (!Tiles::kOutApart) {
                bulk_wait_read<0>();
                mbarrier_arrive(shared.q_empty(consumer));
            }
        }
    }
};

template <class Tiles, bool kOptions>
__global__ void __launch_bounds__(Tiles::kThreads, 1)
    attention_fwd_sm90_kernel(const __grid_constant__ FwdSm90Arguments a) {
    const FwdSm90Shared<Tiles> shared{shared_memory()};
    if (threadIdx.x == 0) {
        tma_prefetch(&a.q);
        tma_prefetch(&a.k);
        tma_prefetch(&a.v);
        tma_prefetch(&a.out);
        shared.initialise();
    }
    __syncthreads();
    const int warpgroup = warpgroup_index();
    if (warpgroup == 0) {
        warpgroup_reg_dealloc<Tiles::kProducerRegisters>();
        if (threadIdx.x == 0) produce<Tiles>(a, shared);
    } else {
        warpgroup_reg_alloc<Tiles::kConsumerRegisters>();
        FwdSm90Consumer<Tiles, kOptions>{a, shared, warpgroup - 1, {}, {}}.run();
    }
}

// k and v of heads that are worked on together take at most half of an H200's L2 cache.
constexpr int64_t kFwdSm90CacheBytes = 25 << 20;

// Tiles are taken in pairs where every CTA gets several pairs and every head has several tiles.
// Otherwise single tiles, the longest first, are balanced better. With 132 CTAs and causal masks
// the last CTA ends 1-4% after the mean with pairs. With single tiles it ends 2-5% after the mean
// where tiles are few, and up to 36% after it where they are many.
constexpr int64_t kFwdSm90RoundsOfPairs = 4, kFwdSm90BlocksForPairs = 5;

// kOptions: softcap or ALiBi, or a scale that is not positive (see scores_are_plain).
template <class T, int kNumber, bool kOptions>
void launch_attention_fwd_sm90_build(const AttentionFwd& p, const Stream& stream) {
    using Tiles = FwdTilesOf<T, kNumber>;
    constexpr DType kDType = std::is_same_v<T, __half> ? DType::f16 : DType::bf16;
    const AttentionCall& c = p.call;
    const int64_t heads = static_cast<int64_t>(c.batch) * c.H;
    const int64_t row_blocks = divide_up(c.Tq, Tiles::kRows);
    const int64_t tiles = row_blocks * heads;
    const int64_t ctas = std::min<int64_t>(tiles, multiprocessors(stream.device));
    const int64_t pairs_of_head = divide_up(row_blocks, 2);
    const bool paired = c.left < 0 && c.right >= 0 && row_blocks >= kFwdSm90BlocksForPairs &&
                        pairs_of_head * heads >= kFwdSm90RoundsOfPairs * ctas;
    const int64_t items_of_head = paired ? pairs_of_head : row_blocks;
    const int64_t bytes_of_head = 2 * int64_t{sizeof(T)} * c.Tk * c.D * c.Hk / c.H;
    const int64_t together =
        std::max<int64_t>(1, kFwdSm90CacheBytes / std::max<int64_t>(1, bytes_of_head));
    const auto map = [&](const void* base, const Strides& strides, int tokens, int heads_of_entry,
                         int rows) {
        return tensor_map(attention_map_shape(kDType, base, strides, c.batch, tokens,
                                              heads_of_entry, c.D, rows,
                                              swizzled_panel_cols(Tiles::kWidth)));
    };
    const FwdSm90Arguments arguments{
        p,
        map(p.q, p.q_strides, c.Tq, c.H, kWarpgroupRows),
        map(p.k, p.k_strides, c.Tk, c.Hk, Tiles::kKeys),
        map(p.v, p.v_strides, c.Tk, c.Hk, Tiles::kKeys),
        map(p.out, contiguous_strides(c.Tq, c.H, c.D), c.Tq, c.H, kWarpgroupRows),
        paired,
        static_cast<unsigned>(items_of_head * heads),
        static_cast<unsigned>(items_of_head),
        static_cast<unsigned>(items_of_head * heads / ctas),
        static_cast<unsigned>(row_blocks),
        static_cast<unsigned>(heads),
        static_cast<unsigned>(std::min(together, heads))};
    const std::string shape = shape_of(c);
    launch(attention_fwd_sm90_kernel<Tiles, kOptions>,
           {.name = "attention_fwd_sm90_kernel",
            .shape = shape,
            .grid = grid_of("attention_fwd_sm90_kernel", shape, ctas),
            .threads = Tiles::kThreads,
            .shared_bytes = Tiles::kSharedBytes,
            .stream = stream,
            .tiles = tiles,
            .built = kFwdBuilds[kNumber]},
           arguments);
}

template <class T, int kWidth>
void launch_attention_fwd_sm90_of(const AttentionFwd& p, int build, Stream stream) {
    constexpr DType kDType = std::is_same_v<T, __half> ? DType::f16 : DType::bf16;
    with_number<kFwdCount>(build, [&](auto number) {
        constexpr FwdRow kRow = kFwdRows[number];
        if constexpr (kRow.width == kWidth) {
            if (scores_are_plain(p.call)) {
                if constexpr (is_compiled(kRow.rule, kDType, false))
                    launch_attention_fwd_sm90_build<T, number, false>(p, stream);
            } else {
                if constexpr (is_compiled(kRow.rule, kDType, true))
                    launch_attention_fwd_sm90_build<T, number, true>(p, stream);
            }
        }
    });
}

}  // namespace gk
