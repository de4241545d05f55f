// Attention forward: online softmax over blocks of keys (Milakov and Gimelshein, 2018; Dao,
// "FlashAttention-2", 2023).
//
//     m' = max(m, max_j s_j)                      p = exp2(s - m')
//     l = l exp2(m - m') + sum_j p                o = o exp2(m - m') + p v
//     out = o / l                                 lse = (m + log2 l) ln 2
//
// A sink enters m and l at the end (attention/row_end.h).
//
// q (B, Tq, H, D), k and v (B, Tk, Hk, D), any strides with a unit last one; out (B, Tq, H, D) and
// lse (B, H, Tq) fp32, contiguous. Moves q and out once, k and v once for each block of kRows
// queries; scores never leave the registers. Saved for the backward pass: q, k, v, out in their
// dtype, and lse. Dropout zeroes p only in the product with v; the normaliser l sums the undropped
// weights.
//
// A CTA takes kRows queries of one head. Each of its warps owns 16 or 32 of these queries: their q,
// scores, softmax and part of o. The CTA visits the blocks of keys from right to left. Tiles of
// kKeys x kWidth pass through a ring of slots: k of the last block, v of the last block, k of the
// block before it, and so on.
#pragma once

#include <algorithm>

#include "attention/products.h"
#include "attention/row_end.h"
#include "attention/scores.h"
#include "device/copy.h"
#include "device/philox.h"
#include "device/tile.h"
#include "device/vector.h"

namespace gk {

constexpr int kFwdWarps = 4, kFwdThreads = 32 * kFwdWarps;

// The tiles by dtype and padded width. A warp has two row tiles (32 queries) where registers allow:
// every fragment of k and v read from shared memory then feeds two products; otherwise mma.sync
// waits for shared memory. kKeys is the largest that spills no registers. k and v of a block need
// two slots; a third slot keeps one more tile in flight, where it does not lower the number of CTAs
// that fit.
template <class T, int kHeadWidth>
struct FwdTiles {
    static constexpr bool kHalf = sizeof(T) == 2;
    static constexpr int kWidth = kHeadWidth;  // in shared memory; columns from D on are zeros
    static constexpr int kRowTiles = kWidth <= (kHalf ? 128 : 64) ? 2 : 1;
    static constexpr int kRows = kFwdWarps * 16 * kRowTiles;
    static constexpr int kKeys = !kHalf          ? (kWidth == 64 || kWidth == 256 ? 16 : 32)
                                 : kWidth == 96  ? 48
                                 : kWidth == 128 ? 32
                                 : kWidth == 256 ? 32
                                                 : 64;
    static constexpr bool kFenced = !kHalf && kWidth == 256;
    static constexpr int kSlots = kHalf ? (kWidth == 64 || kWidth == 256 ? 3 : 2)
                                        : (kWidth <= 96 ? 3 : 2);

    using Query = SharedTile<T, kRows, kWidth>;
    using Key = SharedTile<T, kKeys, kWidth>;
    // The flags, one for each warp, lie behind the tiles.
    static constexpr int kSharedBytes = Query::kBytes + kSlots * Key::kBytes + 4 * kFwdWarps;
    static_assert(kSharedBytes <= 99 * 1024, "what every device since sm_80 has");
};

struct FwdArguments {
    AttentionFwd p;
    int row_blocks;      // blocks of kRows queries of one head
    int heads_together;  // heads of the batch whose k and v share the L2 cache
    bool q_aligned, k_aligned, v_aligned, out_aligned;  // all rows start at 16-byte addresses
};

// Which queries of which head a CTA takes. Heads form groups whose k and v fit in the L2 cache.
// Within a group the last rows start first, since they have the most keys under a causal mask.
struct FwdPlace {
    int i0, b, h;

    __device__ FwdPlace(const FwdArguments& a, int rows) {
        const int heads = a.p.call.entries() * a.p.call.H;
        const int group = static_cast<int>(blockIdx.x) / (a.heads_together * a.row_blocks);
        const int within = static_cast<int>(blockIdx.x) % (a.heads_together * a.row_blocks);
        const int together = min(a.heads_together, heads - group * a.heads_together);
        const int bh = group * a.heads_together + within % together;
        const Place place = place_of_queries(a.p.call, bh / a.p.call.H,
                                             a.row_blocks - 1 - within / together, rows);
        i0 = place.start;
        b = place.b;
        h = bh % a.p.call.H;
    }
};

// Fills out and lse of the queries that belong to no sequence. All threads of the grid share the
// work.
template <class T>
__device__ void clear_outside(const AttentionFwd& p) {
    const AttentionCall& c = p.call;
    const int thread = static_cast<int>(threadIdx.x);
    fill_outside(static_cast<T*>(p.out), int64_t{c.H} * c.D, c.cu_seqlens_q, c.batch, c.total_q,
                 T(0.0f), static_cast<int64_t>(blockIdx.x) * kFwdThreads + thread,
                 static_cast<int64_t>(gridDim.x) * kFwdThreads);
    for (int64_t h = blockIdx.x; h < c.H; h += gridDim.x)
        fill_outside(p.lse + h * c.total_q, 1, c.cu_seqlens_q, c.batch, c.total_q, -INFINITY,
                     thread, kFwdThreads);
}

template <class T, int kHeadWidth, bool kOptions>
__global__ void __launch_bounds__(kFwdThreads)
    attention_fwd_kernel(const __grid_constant__ FwdArguments a) {
    using Tiles = FwdTiles<T, kHeadWidth>;
    constexpr int kRowTiles = Tiles::kRowTiles, kKeys = Tiles::kKeys, kSlots = Tiles::kSlots;
    const AttentionFwd& p = a.p;
    const AttentionCall& call = p.call;
    const FwdPlace place(a, Tiles::kRows);
    const int i0 = place.i0, b = place.b, h = place.h;
    const Entry entry = entry_of(call, b);
    if (call.ragged()) clear_outside<T>(p);
    if (i0 >= entry.Tq) return;
    // Looked up again inside and behind the loop, since the loop has no registers to keep these
    // values.
    const auto again = [&] { return entry_of(call, b); };
    const auto band_again = [&] { return band_of(call, again()); };
    const int hk = h / (call.H / call.Hk);
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = lane_index();
    const int row0 = warp * 16 * kRowTiles;          // this warp's first row of the tile
    const int i_first = i0 + row0 + lane / 4;        // this thread's rows: i_first, + 8, + 16, + 24
    const int j_offset = 2 * (lane % 4);             // and its columns of each 8: j_offset, + 1

    const typename Tiles::Query q_tile{reinterpret_cast<T*>(shared_memory())};
    unsigned char* slots = shared_memory() + Tiles::Query::kBytes;
    int* flags = reinterpret_cast<int*>(slots + kSlots * Tiles::Key::kBytes);
    const T* q = static_cast<const T*>(p.q) + entry.at(p.q_strides, entry.q0, i0, h);
    const T* k = static_cast<const T*>(p.k) + entry.at(p.k_strides, entry.k0, 0, hk);
    const T* v = static_cast<const T*>(p.v) + entry.at(p.v_strides, entry.k0, 0, hk);

    const Band band = band_of(call, entry);
    const Range keys = band.keys(i0, Tiles::kRows, kKeys);
    const int j_last = keys.last > keys.first ? (keys.last - 1) / kKeys * kKeys : -kKeys;
    const Score score = score_of_head(call, b, h);
    DropoutKey dropout{};
    if (kOptions && call.dropout.rng != nullptr) dropout = dropout_key(call.dropout);

    // Tile t holds k (t even) or v (t odd) of block t / 2, counted from the right; j is the block's
    // first key. Each tile is one cp.async group, which is empty where there is no such block.
    auto slot = [&](int t) {
        return typename Tiles::Key{reinterpret_cast<T*>(slots + t % kSlots * Tiles::Key::kBytes)};
    };
    auto request = [&](int t, int j, bool is_key) {
        if (j >= keys.first) {
            const T* from = is_key ? k + j * p.k_strides.token : v + j * p.v_strides.token;
            copy_tile<kFwdThreads>(slot(t), from, is_key ? p.k_strides.token : p.v_strides.token,
                                   band.count - j, call.D, is_key ? a.k_aligned : a.v_aligned);
        }
        cp_async_commit();
    };
    // Waits until tile t is there for all threads and all threads are done with tile t - 1, and
    // then fills the slot of tile t - 1 again.
    constexpr int kAhead = kSlots - 1;
    auto advance = [&](int t, int j, int odd) {
        cp_async_wait<kAhead - 1>();
        __syncthreads();
        request(t + kAhead, j - (kAhead + odd) / 2 * kKeys, (kAhead + odd) % 2 == 0);
    };

    if (keys.last > keys.first)
        copy_tile<kFwdThreads>(q_tile, q, p.q_strides.token, entry.Tq - i0, call.D, a.q_aligned);

    float o[kRowTiles][kHeadWidth / 8][4];
    RowState state[kRowTiles];
    // A weight is 0 where a row does not see a key, but 0 * NaN is NaN: NaN or Inf in v would reach
    // that row through the product. The row then shows NaN in o. In that case everything is
    // computed again with the non-finite values taken out of v; they are added at the end to the
    // rows that see them.
    bool careful = false;
#pragma unroll 1
    for (;;) {
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
            state[r] = {{-INFINITY, -INFINITY}, {0, 0}};
#pragma unroll
            for (int d = 0; d < kHeadWidth / 8; ++d)
#pragma unroll
                for (int e = 0; e < 4; ++e) o[r][d][e] = 0;
        }
#pragma unroll
        for (int t = 0; t < kAhead; ++t) request(t, j_last - t / 2 * kKeys, t % 2 == 0);
        int t = 0;
#pragma unroll 1
        for (int j0 = j_last; j0 >= keys.first; j0 -= kKeys, t += 2) {
            float s[kRowTiles][kKeys / 8][4];
            const float factor = kOptions ? kLog2e : call.softmax_scale * kLog2e;
            advance(t, j0, 0);
            score_products<Tiles, T>(s, q_tile, slot(t), row0);
            advance(t + 1, j0, 1);
            if (kOptions) {
#pragma unroll
                for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
                    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            const int position = i_first + 16 * r + e / 2 * 8 + band.shift;
                            const int j = j0 + 8 * n + j_offset + e % 2;
                            float slope_of_cap;
                            s[r][n][e] = score(s[r][n][e], position - j, slope_of_cap);
                        }
            }
            if (keys.needs_mask(j0, kKeys)) {
                // The loops compare with constants, counted from this thread's first row and
                // column.
                const Band own = band_again();
                const int j = j0 + j_offset;
                const int lowest = own.lowest(i_first) - j, reach = own.reach(i_first) - j;
                const int count = own.count - j;
#pragma unroll
                for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
                    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            const int col = 8 * n + e % 2, across = col - 16 * r - e / 2 * 8;
                            if (across < lowest || across > reach || col >= count)
                                s[r][n][e] = -INFINITY;
                        }
            }
#pragma unroll
            for (int r = 0; r < kRowTiles; ++r)
                softmax_step<T>(s[r], o[r], state[r], factor);
            if (kOptions && call.dropout.rng != nullptr) {
#pragma unroll
                for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
                    for (int n = 0; n < kKeys; n += 16) {
                        const uint32_t keep = attention_keep(i0 + row0 + 16 * r, j0 + n,
                                                             b * call.H + h, dropout);
#pragma unroll
                        for (int e = 0; e < 8; ++e)
                            if (!kept(keep, e / 4, e % 4)) s[r][n / 8 + e / 4][e % 4] = 0;
                    }
            }
            if (careful) {
                zero_nonfinite<kFwdThreads>(slot(t + 1));
                __syncthreads();
            }
            value_products<Tiles, T>(o, s, slot(t + 1));
        }
        if (careful) break;
        float zero = 0;  // becomes NaN where an element of o is not finite
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
            for (int d = 0; d < kHeadWidth / 8; ++d)
#pragma unroll
                for (int e = 0; e < 4; ++e) zero = fmaf(o[r][d][e], 0.0f, zero);
        const int lost = __any_sync(0xffffffffu, zero != 0);
        if (lane == 0) flags[warp] = lost;
        __syncthreads();
#pragma unroll
        for (int w = 0; w < kFwdWarps; ++w) careful = careful || flags[w] != 0;
        if (!careful) break;
    }
    if (careful) {
#pragma unroll 1
        for (int j = max(keys.first, 0); j < keys.last; ++j)
#pragma unroll
            for (int d = 0; d < kHeadWidth / 8; ++d)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int col = 8 * d + j_offset + c;
                    const float value =
                        col < call.D ? to_float(v[j * p.v_strides.token + col]) : 0.0f;
                    if (is_finite(value)) continue;
#pragma unroll
                    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
                        for (int half = 0; half < 2; ++half)
                            if (band_again().sees(i_first + 16 * r + 8 * half, j))
                                o[r][d][2 * half + c] += value;
                }
    }

    // The registers go through this warp's own rows of q's tile, so that out is stored by 16 bytes.
    const int64_t out_stride = static_cast<int64_t>(call.H) * call.D;
    const Entry stored = again();
    T* out = static_cast<T*>(p.out) + stored.queries(call, h);
    float* lse = p.lse + stored.row(call, h, 0);
    const float kept_scale = kOptions && call.dropout.rng != nullptr ? call.dropout.scale : 1.0f;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float l = state[r].l[half];
            l += __shfl_xor_sync(0xffffffffu, l, 1);
            l += __shfl_xor_sync(0xffffffffu, l, 2);
            const RowEnd end = row_end<T>(call, h, state[r].m[half], l);
            const int row = row0 + lane / 4 + 16 * r + 8 * half;
            if (lane % 4 == 0 && i0 + row < stored.Tq) lse[i0 + row] = end.lse;
            const float scale = kept_scale * end.scale;
#pragma unroll
            for (int d = 0; d < kHeadWidth / 8; ++d)
                *reinterpret_cast<Pack<T, 2>*>(q_tile.at(row, 8 * d + j_offset)) = from_floats<T>(
                    o[r][d][2 * half] * scale, o[r][d][2 * half + 1] * scale);
        }
    __syncwarp();
    constexpr int kChunk = Tiles::Query::kChunk;
    constexpr int kChunks = static_cast<int>(Tiles::Query::kChunks);
#pragma unroll 4
    for (int index = lane; index < 16 * kRowTiles * kChunks; index += 32) {
        const int row = row0 + index / kChunks, col = index % kChunks * kChunk;
        if (i0 + row >= stored.Tq || col >= call.D) continue;
        T* to = out + (i0 + row) * out_stride + col;
        const T* from = q_tile.at(row, col);
        if (a.out_aligned) {
            st128(to, ld128(from));
        } else {
            for (int c = 0; c < min(kChunk, call.D - col); ++c) to[c] = from[c];
        }
    }
}

// k and v of the heads that are worked on together take at most this much of the L2 cache. These
// heads are enough to fill the machine.
constexpr int64_t kFwdCacheBytes = 16 << 20;

template <class T, int kWidth, bool kOptions>
void launch_attention_fwd_tiles(const AttentionFwd& p, Stream stream) {
    using Tiles = FwdTiles<T, kWidth>;
    const AttentionCall& c = p.call;
    const int64_t size = sizeof(T), heads = static_cast<int64_t>(c.entries()) * c.H;
    const int64_t row_blocks = query_blocks(c, Tiles::kRows);
    const int64_t bytes_of_head = 2 * size * c.Tk * c.D * c.Hk / c.H;
    const int64_t together =
        std::max<int64_t>(1, kFwdCacheBytes / std::max<int64_t>(1, bytes_of_head));
    const Strides out = contiguous_strides(c.total_q, c.H, c.D);
    const FwdArguments arguments{p,
                                 static_cast<int>(row_blocks),
                                 static_cast<int>(std::min(together, heads)),
                                 aligned_rows(p.q, size, p.q_strides),
                                 aligned_rows(p.k, size, p.k_strides),
                                 aligned_rows(p.v, size, p.v_strides),
                                 aligned_rows(p.out, size, out)};
    const std::string shape = shape_of(c);
    launch(attention_fwd_kernel<T, kWidth, kOptions>,
           {"attention_fwd_kernel", shape,
            grid_of("attention_fwd_kernel", shape, row_blocks * heads), kFwdThreads,
            Tiles::kSharedBytes, stream},
           arguments);
}

template <class T>
void launch_attention_fwd_of(const AttentionFwd& p, Stream stream) {
    dispatch_width(p.call.D, [&](auto width) {
        if (scores_are_plain(p.call))
            launch_attention_fwd_tiles<T, width, false>(p, stream);
        else
            launch_attention_fwd_tiles<T, width, true>(p, stream);
    });
}

}  // namespace gk
