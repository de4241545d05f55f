// Attention backward on Hopper, the main kernel: a CTA keeps a block of keys in shared memory and
// visits the queries that see these keys, of every query head that reads this key head (Shah et
// al., "FlashAttention-3", 2024). Formulas: attention/bwd/kernel.h.
//
// Warpgroup 0 moves data: one warp loads by TMA, and for each other warpgroup one warp adds its
// part of dq to the fp32 sum in memory, by bulk copies out of shared memory. The other warpgroups
// multiply. They divide the work as attention/bwd/sm90/narrow.h says or, from 192 columns on, as
// attention/bwd/sm90/wide.h does.
//
// q, dout (B, Tq, H, D), k, v (B, Tk, Hk, D), any strides that TMA can address; dk, dv (B, Tk, Hk,
// D) contiguous. Moves k, v, dk and dv once; for each block of keys, moves q and dout once and 4
// bytes for each element of dq. dk and dv are summed in a fixed order. With `deterministic` dq is
// too: then one block of keys after another, from the last block on, adds to a block of rows.
#pragma once

#include "attention/bwd/sm90/narrow.h"
#include "attention/bwd/sm90/wide.h"

namespace gk {

template <class T, int kNumber, bool kOptions>
__global__ void __launch_bounds__(BwdTiles<T, kNumber>::kThreads, 1)
    attention_bwd_sm90_kernel(const __grid_constant__ BwdSm90 a) {
    using Tiles = BwdTiles<T, kNumber>;
    unsigned char* arena = shared_memory();
    // The value is the same in all lanes of a warp; the shuffle lets the compiler know that.
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
    const int lane = lane_index();
    if (warp == 0 && lane == 0) {
        BwdBarriers<Tiles>(arena).init();
        tma_prefetch(&a.k);
        tma_prefetch(&a.q);
        tma_prefetch(&a.v);
        tma_prefetch(&a.dout);
    }
    __syncthreads();
    const BwdWork<Tiles> work(a);
    if (warp < 4) {
        warpgroup_reg_dealloc<Tiles::kMoverRegisters>();
        if (warp == 0) {
            if (lane == 0) load_tiles<T>(a, work, arena);
        } else if (warp <= Tiles::kConsumers) {
            add_dq(a, work, arena, warp - 1);
        }
        return;
    }
    warpgroup_reg_alloc<Tiles::kConsumerRegisters>();
    using Consumer = std::conditional_t<Tiles::kWide, BwdWide<T, Tiles, kOptions>,
                                        BwdNarrow<T, Tiles, kOptions>>;
    Consumer me{{a, work, arena, warp / 4 - 1, 16 * (warp % 4) + lane / 4, 2 * (lane % 4)}};
    me.run();
    if (!__all_sync(0xffffffffu, me.finite()) && lane == 0) semaphore_release(a.p.turns, 1);
    me.store();
    if (threadIdx.x % 128 == 0) bulk_wait_read<0>();
}

template <class T, int kNumber, bool kOptions>
void launch_attention_bwd_sm90_build(const BwdSm90& a, const Stream& stream) {
    using Tiles = BwdTiles<T, kNumber>;
    const AttentionCall& c = a.p.call;
    const std::string shape = shape_of(c);
    launch(attention_bwd_sm90_kernel<T, kNumber, kOptions>,
           {.name = "attention_bwd_sm90_kernel",
            .shape = shape,
            .grid = grid_of("attention_bwd_sm90_kernel", shape,
                            static_cast<int64_t>(a.key_blocks) * c.batch * c.Hk),
            .threads = Tiles::kThreads,
            .shared_bytes = Tiles::kSharedBytes,
            .stream = stream,
            .built = kBwdBuilds[kNumber]},
           a);
}

template <class T, int kWidth>
void launch_attention_bwd_sm90_main(const BwdSm90& a, int build, Stream stream) {
    constexpr DType kDType = std::is_same_v<T, __half> ? DType::f16 : DType::bf16;
    with_number<kBwdCount>(build, [&](auto number) {
        constexpr BwdRow kRow = kBwdRows[number];
        if constexpr (kRow.width == kWidth) {
            if (bwd_has_options(a.p.call)) {
                if constexpr (is_compiled(kRow.rule, kDType, true))
                    launch_attention_bwd_sm90_build<T, number, true>(a, stream);
            } else {
                if constexpr (is_compiled(kRow.rule, kDType, false))
                    launch_attention_bwd_sm90_build<T, number, false>(a, stream);
            }
        }
    });
}

}  // namespace gk
