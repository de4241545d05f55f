// Attention backward, dq: a CTA keeps a block of queries and visits the keys that these queries see
// (Dao, "FlashAttention-2", 2023). Formulas: attention/bwd/kernel.h.
//
// After s = q k^T and dp = dout v^T, ds stays in registers as the left operand of dq += ds k. There
// are no atomics: the same input gives the same bits. In fp32 the kernel first visits all keys once
// to sum p and p dp of each row; the keys kernel needs these sums too.
//
// Where the slopes of ALiBi have a gradient, by_query = sum_j |position - j| ds, with ds before the
// softcap's slope, is summed on the way.
//
// q, dout (B, Tq, H, D), k, v (B, Tk, Hk, D), any strides with a unit last one; dq (B, Tq, H, D)
// contiguous. Moves q, dout and dq once, and k and v once (in fp32 twice) for each block of kRows
// queries.
#pragma once

#include "attention/bwd/kernel.h"

namespace gk {

// Each warp owns 16 or 32 queries: their q and dout in shared memory, their dq in registers. It
// owns 32 where registers allow, as every fragment of k and v then feeds two products. k and v have
// two slots, so that the next tiles arrive while these are read. All tiles fit in 99 KB.
template <class T, int kHeadWidth>
struct QueriesTiles {
    static constexpr int kWidth = kHeadWidth;  // in shared memory; columns from D on are zeros
    static constexpr bool kHalf = sizeof(T) == 2;
    static constexpr int kRowTiles = kHalf && kWidth == 64 ? 2 : 1;
    static constexpr int kWarps = kHalf ? (kWidth == 96 || kWidth == 128 ? 8 : 4)
                                        : (kWidth <= 128 ? 4 : 2);
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kRows = 16 * kRowTiles * kWarps;
    static constexpr int kKeys = kWidth <= (kHalf ? 192 : 96) ? 32 : 16;
    static constexpr int kSlots = !kHalf && kWidth == 256 ? 1 : 2;

    using Query = SharedTile<T, kRows, kWidth>;
    using Key = SharedTile<T, kKeys, kWidth>;
    static constexpr int kDout = Query::kBytes;
    static constexpr int kK = 2 * Query::kBytes;
    static constexpr int kV = kK + kSlots * Key::kBytes;
    static constexpr int kTaint = kV + kSlots * Key::kBytes;
    static constexpr int kByQuery = kTaint + 4 * kKeys;
    static constexpr int kNext = kByQuery + 4 * kRows;
    static constexpr int kSharedBytes = kNext + (kHalf ? 4 : 0);
    static_assert(kSharedBytes <= 99 * 1024, "what every device since sm_80 has");
};

// Adds the four lanes' parts of each row's sum to `sums`, of the warp's rows.
template <int kRowTiles>
__device__ __forceinline__ void add_rows(float* sums, float (&parts)[kRowTiles][2]) {
    const int lane = lane_index();
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float part = parts[r][half];
            part += __shfl_xor_sync(0xffffffffu, part, 1);
            part += __shfl_xor_sync(0xffffffffu, part, 2);
            if (lane % 4 == 0) sums[16 * r + 8 * half + lane / 4] += part;
        }
}

template <class T, int kHeadWidth>
__device__ __forceinline__ void bwd_queries_block(const BwdArguments& a, int block) {
    using Tiles = QueriesTiles<T, kHeadWidth>;
    constexpr int kRowTiles = Tiles::kRowTiles, kKeys = Tiles::kKeys, kRows = Tiles::kRows;
    const AttentionBwd& p = a.p;
    const AttentionCall& call = p.call;
    // The last rows of a causal triangle have the most keys, so their blocks come first.
    const int row_blocks = query_blocks(call, kRows);
    const int head = block / row_blocks, h = head % call.H;
    const Place place =
        place_of_queries(call, head / call.H, row_blocks - 1 - block % row_blocks, kRows);
    const int b = place.b, i0 = place.start, bh = b * call.H + h;
    const Entry entry = entry_of(call, b);
    if (i0 >= entry.Tq) return;
    // Looked up again behind the loop, since the loop has no registers to keep these values.
    const auto again = [&] { return entry_of(call, b); };
    const int hk = h / (call.H / call.Hk);
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = lane_index();
    const int row0 = warp * 16 * kRowTiles;    // this warp's first row of the tile
    const int i_first = i0 + row0 + lane / 4;  // this thread's rows: i_first, + 8, + 16, + 24
    const int j_offset = 2 * (lane % 4);       // and its columns of each 8: j_offset, + 1

    unsigned char* arena = shared_memory();
    const typename Tiles::Query q_tile{reinterpret_cast<T*>(arena)};
    const typename Tiles::Query dout_tile{reinterpret_cast<T*>(arena + Tiles::kDout)};
    float* taint = reinterpret_cast<float*>(arena + Tiles::kTaint);  // [kKeys], of a masked block
    // [kRows], so that calls that do not want it lose no registers. One thread has a row's.
    float* by_query = reinterpret_cast<float*>(arena + Tiles::kByQuery);

    const Band band = band_of(call, entry);
    const Range keys = band.keys(i0, kRows, kKeys);
    const int blocks = keys.last > keys.first ? (keys.last - keys.first + kKeys - 1) / kKeys : 0;
    const int summing = kExact<T> ? blocks : 0;  // the first steps, which compute the rows' sums
    const int steps = summing + (p.dq != nullptr || p.by_query != nullptr ? blocks : 0);
    const Score score = score_of_head(call, b, h);
    const bool dropping = call.dropout.rng != nullptr;
    const bool plain = call.softcap == 0 && call.alibi_slopes == nullptr && !dropping;

    auto slot = [&](int start, int step) {
        return typename Tiles::Key{
            reinterpret_cast<T*>(arena + start + step % Tiles::kSlots * Tiles::Key::kBytes)};
    };
    auto first_key = [&](int step) {
        return keys.first + (step < summing ? step : step - summing) * kKeys;
    };
    auto request = [&](int step) {
        if (step < steps) {
            const int j0 = first_key(step), valid = band.count - j0;
            copy_tile<Tiles::kThreads>(slot(Tiles::kK, step),
                                       static_cast<const T*>(p.k) +
                                           entry.at(p.k_strides, entry.k0, j0, hk),
                                       p.k_strides.token, valid, call.D, a.k_aligned);
            copy_tile<Tiles::kThreads>(slot(Tiles::kV, step),
                                       static_cast<const T*>(p.v) +
                                           entry.at(p.v_strides, entry.k0, j0, hk),
                                       p.v_strides.token, valid, call.D, a.v_aligned);
        }
        cp_async_commit();
    };

    RowStats rows[kRowTiles][2];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            rows[r][half] = row_stats<T>(p, nullptr, entry, h, i_first + 16 * r + 8 * half);
            // delta and total hold sums here. Whether delta of out is finite is already part of
            // lse.
            if (kExact<T>) {
                RowStats& row = rows[r][half];
                row.delta = 0;
                row.total = lane % 4 == 0 ? weight_of_sink(call, h, row.lse) : 0;
            }
        }
    auto finish_sums = [&]() {
        __syncwarp();  // the four lanes of a row have read the values that one of them overwrites
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                RowStats& row = rows[r][half];
#pragma unroll
                for (int lanes = 1; lanes < 4; lanes *= 2) {
                    row.delta += __shfl_xor_sync(0xffffffffu, row.delta, lanes);
                    row.total += __shfl_xor_sync(0xffffffffu, row.total, lanes);
                }
                if (row.total == 0) row.total = 1;
                row.delta /= row.total;
                const int i = i_first + 16 * r + 8 * half;
                if (lane % 4 == 0 && i < entry.Tq) {
                    const int64_t at = again().row(call, h, i);
                    p.delta[at] = row.delta;
                    p.total[at] = row.total;
                }
            }
    };

    float dq[kRowTiles][kHeadWidth / 8][4];
    clear(dq);
    if (lane < 16 * kRowTiles) by_query[row0 + lane] = 0;
    __syncwarp();
    if (steps > 0) {
        copy_tile<Tiles::kThreads>(q_tile,
                                   static_cast<const T*>(p.q) +
                                       entry.at(p.q_strides, entry.q0, i0, h),
                                   p.q_strides.token, entry.Tq - i0, call.D, a.q_aligned);
        copy_tile<Tiles::kThreads>(dout_tile,
                                   static_cast<const T*>(p.dout) +
                                       entry.at(p.dout_strides, entry.q0, i0, h),
                                   p.dout_strides.token, entry.Tq - i0, call.D, a.dout_aligned);
        request(0);
    }
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        const int j0 = first_key(step);
        cp_async_wait<0>();
        __syncthreads();  // k and v are there; all threads are done with the other slot
        if (Tiles::kSlots == 2) request(step + 1);
        if (kExact<T> && step == summing) finish_sums();
        const bool masked = keys.needs_mask(j0, kKeys);
        if (masked) {
            clear_nonfinite_rows<Tiles::kThreads>(slot(Tiles::kK, step), taint);
            __syncthreads();
        }

        float s[kRowTiles][kKeys / 8][4], ds[kRowTiles][kKeys / 8][4], along[kRowTiles][2] = {};
        multiply_rows<T>(s, q_tile, row0, slot(Tiles::kK, step));
        multiply_rows<T>(ds, dout_tile, row0, slot(Tiles::kV, step));
        if (!kExact<T> && plain && !masked) {
#pragma unroll
            for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
                for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        weigh<T, true>(s[r][n][e], ds[r][n][e], rows[r][e / 2], score, 0, false,
                                       true, 1.0f);
        } else {
            // The key is read again in each step: the loop without dropout has no registers to
            // spare.
            DropoutKey dropout{};
            if (dropping) dropout = dropout_key(call.dropout);
#pragma unroll
            for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
                for (int n = 0; n < kKeys / 8; n += 2) {
                    uint32_t keep = 0;
                    if (dropping)
                        keep = attention_keep(i0 + row0 + 16 * r, j0 + 8 * n, bh, dropout);
#pragma unroll
                    for (int e = 0; e < 8; ++e) {
                        float& product = s[r][n + e / 4][e % 4];
                        float& slope = ds[r][n + e / 4][e % 4];
                        const int i = i_first + 16 * r + e % 4 / 2 * 8;
                        const int j = j0 + 8 * (n + e / 4) + j_offset + e % 2;
                        const int distance = i + band.shift - j;
                        const bool keeps = kept(keep, e / 4, e % 4);
                        const bool sees = !masked || band.sees(i, j);
                        RowStats& row = rows[r][e % 4 / 2];
                        if (masked) product += taint[j - j0];
                        if (kExact<T> && step < summing) {
                            float slope_of_cap;
                            const float p_here = weight_of<T, false>(product, row.lse, score,
                                                                     distance, slope_of_cap);
                            if (dropping) slope = keeps ? slope * call.dropout.scale : 0.0f;
                            if (sees) {
                                row.total += p_here;
                                row.delta += p_here * slope;
                            }
                            continue;
                        }
                        const float of_score =
                            weigh<T, false>(product, slope, row, score, distance, dropping, keeps,
                                            call.dropout.scale);
                        if (!sees)
                            slope = 0;
                        else if (p.by_query != nullptr)
                            along[r][e % 4 / 2] +=
                                of_score * fabsf(static_cast<float>(distance));
                    }
                }
            if (p.by_query != nullptr && step >= summing) add_rows(by_query + row0, along);
        }
        if (step >= summing) add_products<T>(dq, ds, slot(Tiles::kK, step));
        if (Tiles::kSlots == 1) {
            __syncthreads();  // all threads are done with k and v
            request(step + 1);
        }
    }
    if (kExact<T> && steps == summing) finish_sums();

    const Entry stored = again();
    if (p.by_query != nullptr) {
        __syncwarp();  // the warp's rows are there
        const int row = row0 + lane;
        if (lane < 16 * kRowTiles && i0 + row < stored.Tq)
            p.by_query[stored.row(call, h, i0 + row)] = by_query[row];
    }
    if (p.dq != nullptr)
        store_rows(static_cast<T*>(p.dq) + stored.queries(call, h),
                   static_cast<int64_t>(call.H) * call.D, i0 + row0, stored.Tq, 0, call.D, dq,
                   call.softmax_scale);
}

template <class T, int kHeadWidth>
__global__ void __launch_bounds__(QueriesTiles<T, kHeadWidth>::kThreads, 1)
    attention_bwd_queries_kernel(const __grid_constant__ BwdArguments a) {
    using Tiles = QueriesTiles<T, kHeadWidth>;
    const AttentionCall& c = a.p.call;
    const unsigned blocks = query_blocks(c, Tiles::kRows) * c.entries() * c.H;
    for_blocks<T>(a, blocks, Tiles::kNext,
                  [&](int block) { bwd_queries_block<T, kHeadWidth>(a, block); });
}

template <class T, int kWidth>
void launch_attention_bwd_queries_width(const BwdArguments& a, Stream stream) {
    using Tiles = QueriesTiles<T, kWidth>;
    const AttentionCall& c = a.p.call;
    const int64_t blocks = int64_t{query_blocks(c, Tiles::kRows)} * c.entries() * c.H;
    const std::string shape = shape_of(c);
    launch(attention_bwd_queries_kernel<T, kWidth>,
           {"attention_bwd_queries_kernel", shape,
            grid_for<Tiles>("attention_bwd_queries_kernel", shape, a, blocks, stream.device),
            Tiles::kThreads, Tiles::kSharedBytes, stream, 1, a.only_if == nullptr ? 0 : blocks},
           a);
}

template <class T>
void launch_attention_bwd_queries(const BwdArguments& a, Stream stream) {
    dispatch_width(a.p.call.D, [&](auto width) {
        launch_attention_bwd_queries_width<T, width>(a, stream);
    });
}

}  // namespace gk
