// Decoding: attention of a few new tokens to a long cache (Dao et al., "Flash-Decoding", 2023). The
// formula is that of attention/fwd/kernel.h; query i of Tq stands at position i + n - Tq of the n
// keys that its batch entry has.
//
// q (B, Tq, H, D), any strides with a unit last one; k and v (B, Tk, Hk, D) likewise, or pages (N,
// page, Hk, D) whose numbers are in block_table (B, pages); out (B, Tq, H, D) and lse (B, H, Tq)
// fp32, contiguous. Moves k and v of n keys once for each block of rows. Everything else is small
// beside them, and the tensor cores wait for memory. No backward pass.
//
// The rows of a product are the query heads that share a key head, for every new token: row i H /
// Hk + h. A CTA takes a block of rows and a split of the keys (attention/decode/split.h). Up to 16
// rows fit in one row tile. Then each warp is a team of its own: it takes every fourth block of
// keys (every second one for wide heads in fp32) through its own ring, and meets the other warps
// only at the end. With more rows the CTA's four warps are one team: they share the keys and divide
// the rows.
//
// An entry with one split writes its result. An entry with several splits writes partial results
// for attention_decode_combine_kernel in attention/decode/launch.cu.
#pragma once

#include <algorithm>

#include "attention/decode/split.h"
#include "attention/products.h"
#include "attention/row_end.h"
#include "attention/scores.h"
#include "device/cp_async.h"
#include "device/tile.h"
#include "device/vector.h"

namespace gk {

// The tiles by dtype, padded width, row tiles of a warp, and whether each warp is a team of its
// own. The ring keeps at least 32 KB of keys and values in flight, as an SM's share of the memory's
// bandwidth and latency requires. It is small enough for two CTAs on an SM of sm_80.
template <class T, int kHeadWidth, int kRowTilesOfWarp, bool kAlone>
struct DecodeTiles {
    static constexpr bool kHalf = sizeof(T) == 2;
    static constexpr int kWidth = kHeadWidth;  // in shared memory; columns from D on are zeros
    static constexpr int kRowTiles = kRowTilesOfWarp;
    static constexpr int kWarps = !kHalf && kWidth > 128 ? 2 : 4, kThreads = 32 * kWarps;
    static constexpr int kTeams = kAlone ? kWarps : 1, kTeamWarps = kWarps / kTeams;
    static constexpr int kRows = 16 * kRowTiles * kTeamWarps;
    static constexpr int kKeys = kAlone                    ? (kHalf && kWidth == 64 ? 32 : 16)
                                 : kWidth == 64              ? 64
                                 : kRowTiles * kWidth == 256 ? 16  // otherwise registers spill
                                                             : 32;
    static_assert(kSplitMultiple % kKeys == 0, "a split is whole blocks");
    static constexpr bool kFenced = !kHalf;

    using Query = SharedTile<T, kRows, kWidth>;
    using Key = SharedTile<T, kKeys, kWidth>;
    using Out = SharedTile<float, kRows, kWidth>;
    static constexpr int kSlots = (kAlone ? 72 : 48) * 1024 / (kTeams * Key::kBytes);
    static_assert(kTeams * (kSlots - 1) * Key::kBytes >= 32 * 1024, "bytes in flight");
    // The teams' results lie where the queries and keys were.
    static constexpr int kTileBytes = std::max(Query::kBytes + kTeams * kSlots * Key::kBytes,
                                               kTeams * Out::kBytes);
    // Behind the tiles lie the teams' maxima and sums, the options of the rows, and a flag for each
    // warp.
    static constexpr int kSharedBytes = kTileBytes + 8 * (kTeams + 1) * kRows + 4 * kWarps;
    static_assert(kSharedBytes <= 99 * 1024, "what every device since sm_80 has");
};

// Copies 16 bytes of a row, asynchronously if the address is aligned: `valid` elements, then zeros.
template <class T>
__device__ __forceinline__ void copy_chunk(T* shared, const T* global, int valid, bool aligned) {
    if (aligned) {
        cp_async_16(shared, global, valid * static_cast<int>(sizeof(T)));
        return;
    }
#pragma unroll 1
    for (int i = 0; i < kPer128<T>; ++i) shared[i] = i < valid ? global[i] : T(0.0f);
}

// The cache of k or of v of one batch entry, for one key head.
struct CacheRows {
    const int32_t* pages;  // numbers of the entry's pages, or null
    int page, cache_pages;
    int entry;

    // The page that holds key j; below, the offset of key j in the cache.
    __device__ int page_of(int j) const {
        return pages == nullptr ? entry : min(max(pages[j / page], 0), cache_pages - 1);
    }
    __device__ int64_t offset(int j, int page_of_j, const Strides& strides) const {
        return page_of_j * strides.batch + (pages == nullptr ? j : j % page) * strides.token;
    }
};

// How the rows of a CTA differ: the token decides which keys a row sees, the slope how fast its
// weights fall.
struct DecodeRowOptions {
    int token;
    float slope;
};

template <class T, int kHeadWidth, int kRowTilesOfWarp, bool kAlone>
__global__ void __launch_bounds__(DecodeTiles<T, kHeadWidth, kRowTilesOfWarp, kAlone>::kThreads, 2)
    attention_decode_kernel(const __grid_constant__ DecodeArguments a) {
    using Tiles = DecodeTiles<T, kHeadWidth, kRowTilesOfWarp, kAlone>;
    using Query = typename Tiles::Query;
    using Key = typename Tiles::Key;
    using Out = typename Tiles::Out;
    constexpr int kRowTiles = Tiles::kRowTiles, kKeys = Tiles::kKeys, kSlots = Tiles::kSlots;
    constexpr int kStep = Tiles::kTeams * kKeys;  // from a team's block of keys to its next one
    constexpr int kChunk = Key::kChunk, kChunks = static_cast<int>(Key::kChunks);
    const AttentionDecode& p = a.p;
    const AttentionCall& call = p.call;

    // Neighbouring CTAs read the same keys; CTAs a little further apart read the same tokens'
    // memory.
    int place = static_cast<int>(blockIdx.x);
    const int row_block = place % a.row_blocks;
    place /= a.row_blocks;
    const int hk = place % call.Hk;
    place /= call.Hk;
    const int split = place % a.p.splits, b = place / a.p.splits;

    const Band band = decode_band(call, b);
    const DecodeSplits splits(a, band, row_block, Tiles::kRows, kKeys);
    if (!splits.has(split)) return;
    const Range& seen = splits.seen;
    const int row_first = row_block * Tiles::kRows;  // the first row of the block
    const int rows = min(a.rows - row_first, Tiles::kRows);
    // Keys outside key_first <= j < j_last are read as zeros: no row sees them, whatever the cache
    // holds there.
    const int key_first = max(band.lowest(row_first / a.group), 0);
    const int split_first = split * splits.keys;
    const int j_last = split_first + min(splits.keys, seen.last - split_first);

    // The shuffle lets the compiler know that all lanes of a warp take the same branches.
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
    const int lane = lane_index();
    const int team = warp / Tiles::kTeamWarps, warp_of_team = warp % Tiles::kTeamWarps;
    const int row0 = warp_of_team * 16 * kRowTiles;  // this warp's first row of the tile
    const bool has_rows = row0 < rows;
    const int j_offset = 2 * (lane % 4);  // this thread's columns of each 8: j_offset, + 1
    const int j_first = max(seen.first, split_first) + team * kKeys;

    unsigned char* arena = shared_memory();
    const Query q_tile{reinterpret_cast<T*>(arena)};
    unsigned char* ring = arena + Query::kBytes + team * kSlots * Key::kBytes;
    float2* stats = reinterpret_cast<float2*>(arena + Tiles::kTileBytes);
    DecodeRowOptions* of_rows =
        reinterpret_cast<DecodeRowOptions*>(stats + Tiles::kTeams * Tiles::kRows);
    int* flags = reinterpret_cast<int*>(of_rows + Tiles::kRows);
    auto meet = [] {  // the barrier of a team
        if constexpr (kAlone)
            __syncwarp();
        else
            __syncthreads();
    };

    // How keys and values are loaded: each lane finds the address of one row of the warp's part of
    // a block, and the other lanes get the address by shuffles. The page of the next block's row is
    // looked up while this block's row is loaded.
    constexpr int kWarpKeys = kKeys / Tiles::kTeamWarps;
    static_assert(kWarpKeys <= 32 && kWarpKeys * kChunks % 32 == 0, "whole passes of a warp");
    const int own_row = warp_of_team * kWarpKeys;
    const CacheRows cache{
        p.block_table == nullptr ? nullptr : p.block_table + static_cast<int64_t>(b) * p.pages,
        p.page, p.cache_pages, b};
    auto key_of_lane = [&](int j0) {
        return max(min(j0 + own_row + lane % kWarpKeys, j_last - 1), key_first);
    };
    auto slot = [&](int t) { return Key{reinterpret_cast<T*>(ring + t % kSlots * Key::kBytes)}; };
    const T* k = static_cast<const T*>(p.k) + hk * p.k_strides.head;
    const T* v = static_cast<const T*>(p.v) + hk * p.v_strides.head;
    int page = 0, next_page = 0;
    // Tile t holds k (t even) or v (t odd) of the team's block t / 2; j is the block's first key.
    // Each tile is one cp.async group, which is empty where there is no such block. Tiles are
    // requested in order.
    auto request = [&](int t, int j, bool is_key) {
        if (j < j_last) {
            if (is_key) {
                page = next_page;
                next_page = cache.page_of(key_of_lane(j + kStep));
            }
            const T* from = is_key ? k : v;
            const int64_t of_lane =
                cache.offset(key_of_lane(j), page, is_key ? p.k_strides : p.v_strides);
            const bool aligned = is_key ? a.k_aligned : a.v_aligned;
            const Key tile = slot(t);
#pragma unroll 2
            for (int pass = 0; pass < kWarpKeys * kChunks / 32; ++pass) {
                const int index = pass * 32 + lane, row = index / kChunks;
                const int col = index % kChunks * kChunk, key = j + own_row + row;
                const int64_t offset = __shfl_sync(0xffffffffu, of_lane, row);
                const bool there = key >= key_first && key < j_last;
                const int valid = there ? max(0, min(call.D - col, kChunk)) : 0;
                copy_chunk(tile.at(own_row + row, col), from + offset + col, valid, aligned);
            }
        }
        cp_async_commit();
    };
    // Waits until tile t is there for the team and all its threads are done with tile t - 1, and
    // then fills the slot of tile t - 1 again.
    constexpr int kAhead = kSlots - 1;
    auto advance = [&](int t, int j, int odd) {
        cp_async_wait<kAhead - 1>();
        meet();
        request(t + kAhead, j + (kAhead + odd) / 2 * kStep, (kAhead + odd) % 2 == 0);
    };

    for (int index = static_cast<int>(threadIdx.x); index < Tiles::kRows * kChunks;
         index += Tiles::kThreads) {
        const int row = index / kChunks, col = index % kChunks * kChunk;
        const int i = (row_first + row) / a.group, h = hk * a.group + (row_first + row) % a.group;
        const T* q = static_cast<const T*>(p.q) + b * p.q_strides.batch + i * p.q_strides.token +
                     h * p.q_strides.head;
        const int valid = row < rows ? max(0, min(call.D - col, kChunk)) : 0;
        copy_chunk(q_tile.at(row, col), q + col, valid, a.q_aligned);
    }
    cp_async_commit();

    for (int row = static_cast<int>(threadIdx.x); row < Tiles::kRows; row += Tiles::kThreads) {
        const int h = hk * a.group + (row_first + row) % a.group;
        of_rows[row] = {(row_first + row) / a.group, score_of_head(call, b, h).slope};
    }
    // The options of one of this thread's rows, two of each row tile. Where registers are short, it
    // pays to read only those that a block needs.
    auto own = [&](int r, int half) { return of_rows[row0 + lane / 4 + 16 * r + 8 * half]; };
    Score score = score_of_head(call, 0, 0);  // each row has a slope of its own
    const float factor = a.plain ? score.factor : kLog2e;

    float o[kRowTiles][kHeadWidth / 8][4];
    RowState state[kRowTiles];
    // As in attention/fwd/kernel.h: where rows see different keys, a value that is not finite must
    // not reach rows that do not see it. If it does, everything is computed again with such values
    // taken out.
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
        if (j_first < j_last) next_page = cache.page_of(key_of_lane(j_first));
#pragma unroll 1
        for (int t = 0; t < kAhead; ++t) request(t, j_first + t / 2 * kStep, t % 2 == 0);
        cp_async_wait<kAhead>();  // q is there
        __syncthreads();
        int t = 0;
#pragma unroll 1
        for (int j0 = j_first; j0 < j_last; j0 += kStep, t += 2) {
            float s[kRowTiles][kKeys / 8][4];
            advance(t, j0, 0);
            if (has_rows) score_products<Tiles, T>(s, q_tile, slot(t), row0);
            advance(t + 1, j0, 1);
            if (careful) {
                zero_nonfinite<32 * Tiles::kTeamWarps>(slot(t + 1));
                meet();
            }
            if (!has_rows) continue;
            if (!a.plain) {
#pragma unroll
                for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int distance = own(r, half).token + band.shift - j0 - j_offset;
                        score.slope = own(r, half).slope;
#pragma unroll
                        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                            for (int c = 0; c < 2; ++c) {
                                float slope_of_cap;
                                float& one = s[r][n][2 * half + c];
                                one = score(one, distance - 8 * n - c, slope_of_cap);
                            }
                    }
            }
            if (seen.needs_mask(j0, kKeys)) {
                const int j = j0 + j_offset;
#pragma unroll
                for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int lowest = band.lowest(own(r, half).token) - j;
                        const int highest = band.highest(own(r, half).token) - j;
#pragma unroll
                        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                            for (int c = 0; c < 2; ++c)
                                if (8 * n + c < lowest || 8 * n + c > highest)
                                    s[r][n][2 * half + c] = -INFINITY;
                    }
            }
#pragma unroll
            for (int r = 0; r < kRowTiles; ++r) softmax_step<T>(s[r], o[r], state[r], factor);
            value_products<Tiles, T>(o, s, slot(t + 1));
        }
        if (careful || call.Tq == 1) break;
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
        for (int w = 0; w < Tiles::kWarps; ++w) careful = careful || flags[w] != 0;
        if (!careful) break;
    }
    if (careful) {
#pragma unroll 1
        for (int j0 = j_first; j0 < j_last; j0 += kStep)
#pragma unroll 1
            for (int j = max(j0, key_first); j < min(j0 + kKeys, j_last); ++j) {
                const T* values = v + cache.offset(j, cache.page_of(j), p.v_strides);
#pragma unroll
                for (int d = 0; d < kHeadWidth / 8; ++d)
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const int col = 8 * d + j_offset + c;
                        const float value = col < call.D ? to_float(values[col]) : 0.0f;
                        if (is_finite(value)) continue;
#pragma unroll
                        for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
                            for (int half = 0; half < 2; ++half)
                                if (band.sees(own(r, half).token, j)) o[r][d][2 * half + c] += value;
                    }
            }
    }

    // The results go through shared memory, where those of the teams are added up and rows are
    // contiguous.
    __syncthreads();
    auto out_tile = [&](int of_team) {
        return Out{reinterpret_cast<float*>(arena + of_team * Out::kBytes)};
    };
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float l = state[r].l[half];
            l += __shfl_xor_sync(0xffffffffu, l, 1);
            l += __shfl_xor_sync(0xffffffffu, l, 2);
            const int row = row0 + lane / 4 + 16 * r + 8 * half;
            if (lane % 4 == 0)
                stats[team * Tiles::kRows + row] = make_float2(state[r].m[half], l);
            const Out tile = out_tile(team);
#pragma unroll
            for (int d = 0; d < kHeadWidth / 8; ++d)
                *reinterpret_cast<float2*>(tile.at(row, 8 * d + j_offset)) =
                    make_float2(o[r][d][2 * half], o[r][d][2 * half + 1]);
        }
    __syncthreads();
#pragma unroll 1
    for (int index = static_cast<int>(threadIdx.x); index < rows * (kHeadWidth / 8);
         index += Tiles::kThreads) {
        const int row = index / (kHeadWidth / 8), col = index % (kHeadWidth / 8) * 8;
        if (col >= call.D) continue;
        float m = -INFINITY, l = 0;
#pragma unroll
        for (int w = 0; w < Tiles::kTeams; ++w) m = fmaxf(m, stats[w * Tiles::kRows + row].x);
        Pack<float, 8> sum{};
#pragma unroll
        for (int w = 0; w < Tiles::kTeams; ++w) {
            const float2 own = stats[w * Tiles::kRows + row];
            const float weight = weight_of<T>(own.x, m);
            l = fmaf(own.y, weight, l);
            float values[8];
            load_8(values, out_tile(w), 0, row, col);
#pragma unroll
            for (int c = 0; c < 8; ++c) sum.at[c] = fmaf(values[c], weight, sum.at[c]);
        }
        if (splits.one()) {
            const DecodeRow<T> to(a, b, hk, row_first + row);
            const RowEnd end = row_end<T>(call, to.h, m, l);
            if (col == 0) *to.lse = end.lse;
#pragma unroll
            for (int c = 0; c < 8; ++c) sum.at[c] *= end.scale;
            store_valid<8>(to.out + col, pack_floats<T, 8>(sum.at), call.D - col, a.out_aligned);
        } else {
            const int64_t partial = partial_of(a, b, hk, split, row_first + row);
            if (col == 0) {
                p.partial_stats[2 * partial] = m;
                p.partial_stats[2 * partial + 1] = l;
            }
            const int width = partial_width(call.D);
            store_valid<8>(p.partial_out + partial * width + col, sum, width - col, true);
        }
    }
}

template <class T, int kWidth, int kRowTiles, bool kAlone>
int launch_attention_decode_tiles(DecodeArguments a, Stream stream) {
    using Tiles = DecodeTiles<T, kWidth, kRowTiles, kAlone>;
    const AttentionCall& c = a.p.call;
    a.row_blocks = divide_up(a.rows, Tiles::kRows);
    const int64_t blocks = static_cast<int64_t>(c.batch) * c.Hk * a.p.splits * a.row_blocks;
    const std::string shape = shape_of(c);
    launch(attention_decode_kernel<T, kWidth, kRowTiles, kAlone>,
           {"attention_decode_kernel", shape, grid_of("attention_decode_kernel", shape, blocks),
            Tiles::kThreads, Tiles::kSharedBytes, stream},
           a);
    return Tiles::kRows;
}

// fp32 always takes one row tile: it does not use tensor cores, which profit from more rows.
template <class T, int kWidth>
int launch_attention_decode_width(const DecodeArguments& a, Stream stream) {
    if constexpr (sizeof(T) == 2) {
        if constexpr (kWidth <= 128)
            if (a.rows > 64) return launch_attention_decode_tiles<T, kWidth, 2, false>(a, stream);
        if (a.rows > 16) return launch_attention_decode_tiles<T, kWidth, 1, false>(a, stream);
    }
    return launch_attention_decode_tiles<T, kWidth, 1, true>(a, stream);
}

template <class T>
int launch_attention_decode_of(const DecodeArguments& a, Stream stream) {
    return dispatch_width(a.p.call.D, [&](auto width) {
        return launch_attention_decode_width<T, width>(a, stream);
    });
}

}  // namespace gk
