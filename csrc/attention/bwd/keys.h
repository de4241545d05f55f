// Attention backward, dk and dv: a CTA keeps a block of keys and visits the queries that see these
// keys, of every query head that reads this key head (Dao, "FlashAttention-2", 2023). Formulas:
// attention/bwd/kernel.h.
//
// The kernel computes transposed scores, s^T = k q^T and dp^T = v dout^T (keys by queries), so that
// the weights and ds are left operands of dv += p^T dout and dk += ds^T q straight from the
// registers. Where it also sums dq, ds goes through shared memory to dq = ds k, and dq goes by
// atomics to an fp32 sum in memory. That makes five products in all; with a separate queries kernel
// there are seven. The order of the atomic additions, and with it the last bits of the sum, changes
// from run to run.
//
// q, dout (B, Tq, H, D), k, v (B, Tk, Hk, D), any strides with a unit last one; dk, dv (B, Tk, Hk,
// D) contiguous. Moves k, v, dk and dv once; for each block of kKeys keys, moves q and dout once
// and adds once to the sum of dq. Without atomics the order of every sum is fixed.
#pragma once

#include "attention/bwd/kernel.h"

namespace gk {

// Each warp owns 16 or 32 keys: their k and v in shared memory, their dk and dv in registers. It
// owns 32 where registers allow (D 64): every fragment of q and dout then feeds two products;
// otherwise mma.sync waits for shared memory. From D 192 on, dk and dv do not fit in the registers
// together. Each then takes a kernel of its own, and both compute the scores: five products instead
// of four. q has two slots, so that the next tile arrives while this one is read. dout has one slot,
// which is free in the middle of a step. All tiles fit in 99 KB.
template <class T, int kHeadWidth, bool kDk, bool kDv>
struct KeysTiles {
    static constexpr int kWidth = kHeadWidth;  // in shared memory; columns from D on are zeros
    static constexpr bool kHalf = sizeof(T) == 2;
    static constexpr int kKeyTiles = kHalf && kWidth == 64 ? 2 : 1;
    static constexpr int kWarps = kHalf ? (kWidth == 96 || kWidth == 128 ? 8 : 4)
                                        : (kWidth <= 128 ? 4 : 2);
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kKeys = 16 * kKeyTiles * kWarps;
    static constexpr int kRows = kWidth <= (kHalf ? 128 : 96) ? 32 : 16;
    static constexpr int kSlots = !kHalf && kWidth == 256 ? 1 : 2;
    static constexpr bool kDqHere = kDk && !kExact<T>;
    // The columns of dq that a warp computes at a time. The warps share a tile of kRows x kWidth.
    static constexpr int kDqCols = kWidth == 192 ? 48 : kWidth == 256 ? 64 : 32;

    using Key = SharedTile<T, kKeys, kWidth>;
    using Query = SharedTile<T, kRows, kWidth>;
    using Slope = SharedTile<T, kKeys, kRows>;  // ds^T
    static constexpr int kV = Key::kBytes;
    static constexpr int kQ = kV + (kDk ? Key::kBytes : 0);
    static constexpr int kDout = kQ + kSlots * Query::kBytes;
    static constexpr int kDs = kDout + Query::kBytes;
    static constexpr int kStats = kDs + (kDqHere ? Slope::kBytes : 0);
    static constexpr int kTaint = kStats + 2 * kRows * static_cast<int>(sizeof(RowStats));
    static constexpr int kNext = kTaint + (kDqHere ? 4 * kKeys : 0);
    static constexpr int kSharedBytes = kNext + (kHalf ? 4 : 0);
    static_assert(kSharedBytes <= 99 * 1024, "what every device since sm_80 has");
};

// The layout of the sum of dq: tiles (B, H, query_blocks). Each tile holds the accumulators of one
// warp after another as they lie in the registers, so that a warp's atomics fall into one cache
// line.
template <class Tiles>
struct DqSum {
    static constexpr int kRowTiles = Tiles::kRows / 16;
    static constexpr int kParts = kRowTiles * (Tiles::kWidth / Tiles::kDqCols);
    static constexpr int kFloatsOfPart = 16 * Tiles::kDqCols;

    __device__ static int row(int part) { return part % kRowTiles * 16; }
    __device__ static int col(int part) { return part / kRowTiles * Tiles::kDqCols; }
    __device__ static int64_t at(int64_t tile, int part, int n, int e) {
        return (tile * kParts + part) * kFloatsOfPart + (n * 4 + e) * 32 + lane_index();
    }
};

// dq of the tile += ds k.
template <class Tiles, class T>
__device__ __forceinline__ void add_to_dq(float* dq_sum, int64_t tile,
                                          const typename Tiles::Slope& ds_tile,
                                          const typename Tiles::Key& k_tile) {
    using M = Mma<T>;
    using Sum = DqSum<Tiles>;
    const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll 1
    for (int part = warp; part < Sum::kParts; part += Tiles::kWarps) {
        float acc[1][Tiles::kDqCols / 8][4];
        clear(acc);
#pragma unroll 2
        for (int j = 0; j < Tiles::kKeys; j += M::K) {
            typename M::A ds;
            load_a_transposed(ds, ds_tile, j, Sum::row(part));
#pragma unroll
            for (int n = 0; n < Tiles::kDqCols; n += 16) {
                typename M::B k[2];
                load_b_transposed(k, k_tile, j, Sum::col(part) + n);
                M::multiply(acc[0][n / 8], ds, k[0]);
                M::multiply(acc[0][n / 8 + 1], ds, k[1]);
            }
        }
#pragma unroll
        for (int n = 0; n < Tiles::kDqCols / 8; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                atomicAdd(dq_sum + Sum::at(tile, part, n, e), acc[0][n][e]);
    }
}

template <class T, int kHeadWidth, bool kDk, bool kDv>
__device__ __forceinline__ void bwd_keys_block(const BwdArguments& a, int block) {
    using Tiles = KeysTiles<T, kHeadWidth, kDk, kDv>;
    constexpr int kKeyTiles = Tiles::kKeyTiles, kKeys = Tiles::kKeys, kRows = Tiles::kRows;
    const AttentionBwd& p = a.p;
    const AttentionCall& call = p.call;
    // The first keys of a causal triangle have the most queries, so their blocks come first.
    const int blocks_of_head = key_blocks(call, kKeys);
    const int key_head = block / blocks_of_head, hk = key_head % call.Hk;
    const Place place = place_of_keys(call, key_head / call.Hk, block % blocks_of_head, kKeys);
    const int b = place.b, j0 = place.start, group = call.H / call.Hk;
    const Entry entry = entry_of(call, b);
    if (j0 >= entry.Tk) return;
    // Looked up again inside and behind the loop, since the loop has no registers to keep these
    // values.
    const auto again = [&] { return entry_of(call, b); };
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = lane_index();
    const int key0 = warp * 16 * kKeyTiles;     // this warp's first key of the tile
    const int j_first = j0 + key0 + lane / 4;   // this thread's keys: j_first, + 8, + 16, + 24
    const int i_offset = 2 * (lane % 4);        // and its queries of each 8: i_offset, + 1

    unsigned char* arena = shared_memory();
    const typename Tiles::Key k_tile{reinterpret_cast<T*>(arena)};
    const typename Tiles::Key v_tile{reinterpret_cast<T*>(arena + Tiles::kV)};
    const typename Tiles::Query dout_tile{reinterpret_cast<T*>(arena + Tiles::kDout)};
    const typename Tiles::Slope ds_tile{reinterpret_cast<T*>(arena + Tiles::kDs)};
    RowStats* stats = reinterpret_cast<RowStats*>(arena + Tiles::kStats);  // [2][kRows]
    float* taint = reinterpret_cast<float*>(arena + Tiles::kTaint);        // [kKeys]

    const Band band = band_of(call, entry);
    const Range queries = band.queries(j0, kKeys, kRows);
    const int blocks = queries.last > queries.first
                           ? (queries.last - queries.first + kRows - 1) / kRows
                           : 0;
    const int steps = group * blocks;
    const bool dropping = call.dropout.rng != nullptr;
    const bool plain = call.softcap == 0 && call.alibi_slopes == nullptr && !dropping;
    const bool adds_dq = Tiles::kDqHere && p.dq_sum != nullptr;

    auto head = [&](int step) { return hk * group + step / blocks; };
    auto first_row = [&](int step) { return queries.first + step % blocks * kRows; };
    auto q_tile = [&](int step) {
        return typename Tiles::Query{
            reinterpret_cast<T*>(arena + Tiles::kQ + step % Tiles::kSlots * Tiles::Query::kBytes)};
    };
    auto request = [&](typename Tiles::Query tile, const void* source, const Strides& strides,
                       bool aligned, int step) {
        if (step < steps) {
            const int i0 = first_row(step);
            copy_tile<Tiles::kThreads>(tile,
                                       static_cast<const T*>(source) +
                                           entry.at(strides, entry.q0, i0, head(step)),
                                       strides.token, entry.Tq - i0, call.D, aligned);
        }
        cp_async_commit();
    };
    auto request_q = [&](int step) { request(q_tile(step), p.q, p.q_strides, a.q_aligned, step); };
    auto request_dout = [&](int step) {
        request(dout_tile, p.dout, p.dout_strides, a.dout_aligned, step);
    };
    auto stats_of = [&](int step) {
        return row_stats<T>(p, p.total, entry, head(step), first_row(step) + thread);
    };

    float dk[kDk ? kKeyTiles : 1][kDk ? kHeadWidth / 8 : 1][4];
    float dv[kDv ? kKeyTiles : 1][kDv ? kHeadWidth / 8 : 1][4];
    clear(dk);
    clear(dv);
    bool broken = false;  // whether a key of the block has a taint
    if (steps > 0) {
        auto request_keys = [&](typename Tiles::Key tile, const void* source,
                                const Strides& strides, bool aligned) {
            copy_tile<Tiles::kThreads>(tile,
                                       static_cast<const T*>(source) +
                                           entry.at(strides, entry.k0, j0, hk),
                                       strides.token, band.count - j0, call.D, aligned);
        };
        request_keys(k_tile, p.k, p.k_strides, a.k_aligned);
        if (kDk) request_keys(v_tile, p.v, p.v_strides, a.v_aligned);
        request_q(0);
        request_dout(0);
        if (thread < kRows) stats[thread] = stats_of(0);
        if (adds_dq) {
            cp_async_wait<0>();
            __syncthreads();
            clear_nonfinite_rows<Tiles::kThreads>(k_tile, taint);
            __syncthreads();
            bool finite = true;
#pragma unroll
            for (int key = 0; key < kKeys; key += 32) finite = finite && taint[key + lane] == 0;
            broken = __any_sync(0xffffffffu, !finite) != 0;
        }
    }

#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        const int i0 = first_row(step), h = head(step), bh = b * call.H + h;
        const RowStats* rows = stats + step % 2 * kRows;
        cp_async_wait<0>();
        __syncthreads();  // q, dout, stats are there; all are done with the last step's q and ds
        if (Tiles::kSlots == 2) request_q(step + 1);
        RowStats next{};
        if (thread < kRows && step + 1 < steps) next = stats_of(step + 1);

        const bool masked = queries.needs_mask(i0, kRows);
        if (masked) {
            const bool finite = lane >= kRows || (is_finite(rows[lane].lse) &&
                                                  is_finite(rows[lane].delta));
            if (__any_sync(0xffffffffu, !finite)) {  // the same in every warp
                clear_nonfinite_rows<Tiles::kThreads>(q_tile(step), nullptr);
                clear_nonfinite_rows<Tiles::kThreads>(dout_tile, nullptr);
                __syncthreads();
            }
        }

        const Score score = score_of_head(call, b, h);
        float s[kKeyTiles][kRows / 8][4], ds[kKeyTiles][kRows / 8][4];
        multiply_rows<T>(s, k_tile, key0, q_tile(step));
        if (kDk)
            multiply_rows<T>(ds, v_tile, key0, dout_tile);
        else
            clear(ds);
        if (plain && !masked && !broken) {
#pragma unroll
            for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const RowStats row = rows[8 * n + i_offset + c];
#pragma unroll
                    for (int r = 0; r < kKeyTiles; ++r)
#pragma unroll
                        for (int half = 0; half < 2; ++half)
                            weigh<T, true>(s[r][n][2 * half + c], ds[r][n][2 * half + c], row,
                                           score, 0, false, true, 1.0f);
                }
        } else {
            // The key is read again in each step: the loop without dropout has no registers to
            // spare.
            DropoutKey dropout{};
            if (dropping) dropout = dropout_key(call.dropout);
#pragma unroll
            for (int r = 0; r < kKeyTiles; ++r)
#pragma unroll
                for (int n = 0; n < kRows / 8; n += 2) {
                    uint32_t keep = 0;
                    if (dropping)
                        keep = attention_keep_transposed(j0 + key0 + 16 * r, i0 + 8 * n, bh,
                                                         dropout);
#pragma unroll
                    for (int e = 0; e < 8; ++e) {
                        float& weight = s[r][n + e / 4][e % 4];
                        float& slope = ds[r][n + e / 4][e % 4];
                        const int i = i0 + 8 * (n + e / 4) + i_offset + e % 2;
                        const int j = j_first + 16 * r + e % 4 / 2 * 8;
                        if (broken) weight += taint[j - j0];
                        weigh<T, false>(weight, slope, rows[i - i0], score, i + band.shift - j,
                                        dropping, kept(keep, e / 4, e % 4), call.dropout.scale);
                        if (masked && !band.sees(i, j)) weight = slope = 0;
                    }
                }
        }
        if constexpr (kDv) add_products<T>(dv, s, dout_tile);
        if (adds_dq) {
#pragma unroll
            for (int r = 0; r < kKeyTiles; ++r)
#pragma unroll
                for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        *reinterpret_cast<Pack<T, 2>*>(
                            ds_tile.at(key0 + 16 * r + 8 * half + lane / 4, 8 * n + i_offset)) =
                            from_floats<T>(ds[r][n][2 * half], ds[r][n][2 * half + 1]);
        }
        __syncthreads();  // all are done with dout; ds is there
        request_dout(step + 1);
        if constexpr (kDk) add_products<T>(dk, ds, q_tile(step));
        if constexpr (Tiles::kDqHere) {
            if (adds_dq)
                add_to_dq<Tiles, T>(p.dq_sum,
                                    first_tile(call, again(), b, h, kRows) + i0 / kRows, ds_tile,
                                    k_tile);
        }
        if (thread < kRows && step + 1 < steps) stats[(step + 1) % 2 * kRows + thread] = next;
        if (Tiles::kSlots == 1) {
            __syncthreads();  // all are done with q
            request_q(step + 1);
        }
    }

    const Entry stored = again();
    const int64_t head_start = stored.keys(call, hk);
    const int64_t row_stride = static_cast<int64_t>(call.Hk) * call.D;
    if constexpr (kDk) {
        if (p.dk != nullptr)
            store_rows(static_cast<T*>(p.dk) + head_start, row_stride, j0 + key0, stored.Tk, 0,
                       call.D, dk, call.softmax_scale);
    }
    if constexpr (kDv) {
        if (p.dv != nullptr)
            store_rows(static_cast<T*>(p.dv) + head_start, row_stride, j0 + key0, stored.Tk, 0,
                       call.D, dv, dropping ? call.dropout.scale : 1.0f);
    }
}

template <class T, int kHeadWidth, bool kDk, bool kDv>
__global__ void __launch_bounds__(KeysTiles<T, kHeadWidth, kDk, kDv>::kThreads, 1)
    attention_bwd_keys_kernel(const __grid_constant__ BwdArguments a) {
    using Tiles = KeysTiles<T, kHeadWidth, kDk, kDv>;
    const AttentionCall& c = a.p.call;
    const unsigned blocks = key_blocks(c, Tiles::kKeys) * c.entries() * c.Hk;
    for_blocks<T>(a, blocks, Tiles::kNext,
                  [&](int block) { bwd_keys_block<T, kHeadWidth, kDk, kDv>(a, block); });
}

constexpr int kDqWarps = 8;

// dq = scale times its sum. One warp takes one part of a tile.
template <class Tiles, class T>
__global__ void __launch_bounds__(32 * kDqWarps)
    attention_bwd_dq_kernel(const __grid_constant__ BwdArguments a) {
    using Sum = DqSum<Tiles>;
    const AttentionCall& call = a.p.call;
    const int row_blocks = query_blocks(call, Tiles::kRows);
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kDqWarps + threadIdx.x / 32;
    const int part = static_cast<int>(index % Sum::kParts);
    const int64_t block = index / Sum::kParts;
    if (block >= static_cast<int64_t>(call.entries()) * call.H * row_blocks) return;
    const int head = static_cast<int>(block / row_blocks), h = head % call.H;
    const Place place = place_of_queries(call, head / call.H,
                                         static_cast<int>(block % row_blocks), Tiles::kRows);
    const int b = place.b, i0 = place.start;
    const Entry entry = entry_of(call, b);
    if (i0 >= entry.Tq) return;
    const int64_t tile = first_tile(call, entry, b, h, Tiles::kRows) + i0 / Tiles::kRows;
    float acc[1][Tiles::kDqCols / 8][4];
#pragma unroll
    for (int n = 0; n < Tiles::kDqCols / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[0][n][e] = a.p.dq_sum[Sum::at(tile, part, n, e)];
    store_rows(static_cast<T*>(a.p.dq) + entry.queries(call, h),
               static_cast<int64_t>(call.H) * call.D, i0 + Sum::row(part), entry.Tq,
               Sum::col(part), call.D, acc, call.softmax_scale);
}

template <class T, int kWidth, bool kDk, bool kDv>
void launch_attention_bwd_keys_part(const BwdArguments& a, Stream stream) {
    using Tiles = KeysTiles<T, kWidth, kDk, kDv>;
    const AttentionCall& c = a.p.call;
    const int64_t blocks = int64_t{key_blocks(c, Tiles::kKeys)} * c.entries() * c.Hk;
    const std::string shape = shape_of(c);
    launch(attention_bwd_keys_kernel<T, kWidth, kDk, kDv>,
           {"attention_bwd_keys_kernel", shape,
            grid_for<Tiles>("attention_bwd_keys_kernel", shape, a, blocks, stream.device),
            Tiles::kThreads, Tiles::kSharedBytes, stream, 1, a.only_if == nullptr ? 0 : blocks},
           a);
    if constexpr (Tiles::kDqHere) {
        if (a.p.dq_sum == nullptr) return;
        const int64_t tiles = int64_t{query_blocks(c, Tiles::kRows)} * c.entries() * c.H *
                              DqSum<Tiles>::kParts;
        launch(attention_bwd_dq_kernel<Tiles, T>,
               {"attention_bwd_dq_kernel", shape,
                grid_of("attention_bwd_dq_kernel", shape, divide_up(tiles, kDqWarps)),
                32 * kDqWarps, 0, stream},
               a);
    }
}

template <class T, int kWidth>
void launch_attention_bwd_keys_width(const BwdArguments& a, Stream stream) {
    if constexpr (kWidth < 192) {
        launch_attention_bwd_keys_part<T, kWidth, true, true>(a, stream);
    } else {
        if (a.p.dk != nullptr || a.p.dq_sum != nullptr)
            launch_attention_bwd_keys_part<T, kWidth, true, false>(a, stream);
        if (a.p.dv != nullptr) launch_attention_bwd_keys_part<T, kWidth, false, true>(a, stream);
    }
}

template <class T>
void launch_attention_bwd_keys(const BwdArguments& a, Stream stream) {
    dispatch_width(a.p.call.D,
                   [&](auto width) { launch_attention_bwd_keys_width<T, width>(a, stream); });
}

}  // namespace gk
