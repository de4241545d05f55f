// Attention forward on Hopper: which tiles are loaded, where they lie in shared memory, and in
// which order they come (the kernel is in attention/fwd/sm90/kernel.h).
#pragma once

#include "attention/fwd/sm90/tiles.h"
#include "device/mbarrier.h"
#include "device/pipeline.h"
#include "device/tma.h"

namespace gk {

// The layout of shared memory.
template <class Tiles>
struct FwdSm90Shared {
    using T = typename Tiles::Type;
    using Query = typename Tiles::Query;
    using Key = typename Tiles::Key;
    static constexpr int kStages = kFwdSm90Stages;

    unsigned char* base;

    __device__ Key k(int stage) const { return {at(stage * Key::kBytes)}; }
    __device__ Key v(int stage) const { return {at((kStages + stage) * Key::kBytes)}; }
    __device__ Query q(int consumer) const {
        return {at(Tiles::kKeyBytes + consumer * Query::kBytes)};
    }
    __device__ Query out(int consumer) const {
        return q(consumer + (Tiles::kOutApart ? Tiles::kConsumers : 0));
    }
    __device__ uint64_t* k_full(int stage) const { return barrier(stage); }
    __device__ uint64_t* k_empty(int stage) const { return barrier(kStages + stage); }
    __device__ uint64_t* v_full(int stage) const { return barrier(2 * kStages + stage); }
    __device__ uint64_t* v_empty(int stage) const { return barrier(3 * kStages + stage); }
    __device__ uint64_t* q_full(int consumer) const { return barrier(4 * kStages + consumer); }
    __device__ uint64_t* q_empty(int consumer) const {
        return barrier(4 * kStages + Tiles::kConsumers + consumer);
    }

    // One thread calls this. One lane of each warp that has read a stage releases it, and q's tile
    // likewise. Where out leaves through q's tile, the thread that stores out releases the tile.
    __device__ void initialise() const {
        for (int stage = 0; stage < kStages; ++stage) {
            mbarrier_init(k_full(stage), 1);
            mbarrier_init(k_empty(stage), kReaders * Tiles::kConsumers);
            mbarrier_init(v_full(stage), 1);
            mbarrier_init(v_empty(stage), kReaders * Tiles::kConsumers);
        }
        for (int consumer = 0; consumer < Tiles::kConsumers; ++consumer) {
            mbarrier_init(q_full(consumer), 1);
            mbarrier_init(q_empty(consumer), Tiles::kOutApart ? kReaders : 1);
        }
        mbarrier_init_fence();
    }

  private:
    static constexpr unsigned kReaders = kWarpgroup / 32;

    __device__ T* at(int bytes) const { return reinterpret_cast<T*>(base + bytes); }
    __device__ uint64_t* barrier(int i) const {
        constexpr int kOffset = Tiles::kSharedBytes - Tiles::kBarrierBytes;
        return reinterpret_cast<uint64_t*>(base + kOffset) + i;
    }
};

// Which queries of which head a CTA takes in its nth turn. All threads compute it for themselves,
// so the producer and the consumers agree without communication.
//
// Heads form groups whose k and v fit in the L2 cache. Within a group the last rows come first,
// since they have the most keys under a causal mask. If paired, a late tile goes with the early
// tile that is as far from the other end: under a causal mask all pairs have equal work, and every
// CTA gets the same number of pairs. The pairs that are left over at the end consist of tiles of
// medium length; these are dealt out singly, the longest first. If not paired, tiles are dealt out
// singly, and in reverse in every other turn: a CTA that had a longer tile gets a shorter one next.
struct FwdSm90Place {
    bool exists;
    int i0, b, h;  // the middle tile has no partner: then i0 is past the last query

    __device__ FwdSm90Place(const FwdSm90Arguments& a, unsigned turn, int rows) {
        const unsigned ctas = gridDim.x, cta = blockIdx.x;
        unsigned item = turn * ctas + (turn % 2 == 0 ? cta : ctas - 1 - cta);
        bool early = false;
        if (a.paired && turn < 2 * a.rounds) {
            item = turn / 2 * ctas + cta;
            early = turn % 2 != 0;
        } else if (a.paired) {
            const unsigned rest = a.items - a.rounds * ctas;
            const unsigned single = item - 2 * a.rounds * ctas;
            early = single >= rest;
            item = single >= 2 * rest ? a.items
                                      : a.rounds * ctas + (early ? 2 * rest - 1 - single : single);
        }
        exists = item < a.items;
        if (!exists) return;
        const unsigned per_group = a.heads_together * a.items_of_head;
        const unsigned first = item / per_group * a.heads_together, within = item % per_group;
        const unsigned together = min(a.heads_together, a.heads - first);
        const unsigned head = first + within % together, from_end = within / together;
        unsigned block = a.row_blocks - 1 - from_end;
        if (early) block = from_end == block ? a.row_blocks : from_end;
        i0 = static_cast<int>(block) * rows;
        b = static_cast<int>(head / static_cast<unsigned>(a.p.call.H));
        h = static_cast<int>(head % static_cast<unsigned>(a.p.call.H));
    }
};

// The keys that at least one of the `rows` queries from i0 on sees; none if there are no such
// queries.
__device__ inline Range keys_of_tile(const Band& band, int i0, int rows, int block) {
    Range keys = band.keys(i0, rows, block);
    if (i0 >= band.Tq || keys.last <= keys.first) keys.first = keys.last = 0;
    return keys;
}

// The first key of the rightmost block; it is less than `first` where there is no block.
__device__ inline int last_block(const Range& keys, int block) {
    return keys.last > keys.first ? (keys.last - 1) / block * block : keys.first - block;
}

template <class Tile>
__device__ __forceinline__ void load_tile(const Tile& tile, const TensorMap* map, uint64_t* bar,
                                          int h, int token, int b, CacheHint hint) {
    mbarrier_arrive_expect_tx(bar, Tile::kBytes);
#pragma unroll
    for (int i = 0; i < Tile::kPanels; ++i)
        tma_load(tile.panel(i), map, bar, Coordinates<4>{{i * Tile::kPanelCols, h, token, b}},
                 hint);
}

// What the one thread that loads does. It loads in the order in which the consumers wait: k of the
// last block, q, k of the block before it, v of the last block, and so on.
template <class Tiles>
__device__ __forceinline__ void produce(const FwdSm90Arguments& a,
                                        const FwdSm90Shared<Tiles>& shared) {
    PipelineState<kFwdSm90Stages> k_at, v_at;
#pragma unroll 1
    for (unsigned turn = 0;; ++turn) {
        const FwdSm90Place place(a, turn, Tiles::kRows);
        if (!place.exists) break;
        const int b = place.b, hk = place.h / (a.p.call.H / a.p.call.Hk);
        const Range keys =
            keys_of_tile(band_of(a.p.call, b), place.i0, Tiles::kRows, Tiles::kKeys);
        auto load_k = [&](int j) {
            mbarrier_wait(shared.k_empty(k_at.stage), k_at.phase ^ 1);
            load_tile(shared.k(k_at.stage), &a.k, shared.k_full(k_at.stage), hk, j, b,
                      CacheHint::evict_last);
            k_at.advance();
        };
        int j = last_block(keys, Tiles::kKeys);
        if (j >= keys.first) load_k(j);
#pragma unroll 1
        for (int c = 0; c < Tiles::kConsumers; ++c) {
            mbarrier_wait(shared.q_empty(c), turn % 2 ^ 1);
            load_tile(shared.q(c), &a.q, shared.q_full(c), place.h,
                      place.i0 + c * kWarpgroupRows, b, CacheHint::evict_first);
        }
#pragma unroll 1
        for (; j >= keys.first; j -= Tiles::kKeys) {
            if (j - Tiles::kKeys >= keys.first) load_k(j - Tiles::kKeys);
            mbarrier_wait(shared.v_empty(v_at.stage), v_at.phase ^ 1);
            load_tile(shared.v(v_at.stage), &a.v, shared.v_full(v_at.stage), hk, j, b,
                      CacheHint::evict_last);
            v_at.advance();
        }
    }
}

}  // namespace gk
