// Attention backward on Hopper, main kernel: its tiles, what a CTA works on, and the warps that
// move data. See attention/bwd/sm90/kernel.h.
#pragma once

#include <type_traits>

#include "attention/bwd/sm90/params.h"
#include "device/mbarrier.h"
#include "device/pipeline.h"
#include "device/semaphore.h"
#include "device/swizzled.h"
#include "device/tma.h"
#include "device/warpgroup.h"

namespace gk {

constexpr int kBwdSlots = 2;  // blocks of q in flight
// The panels of k and v, and of dk and dv. A product for dq takes whole ones, so columns past the
// width fill the last one, and they are 0.
constexpr int kKeyPanelCols = 64;

template <class T, int kNumber>
struct BwdTiles {
    static constexpr BwdRow kBuilt = kBwdRows[kNumber];
    static constexpr int kWidth = kBuilt.width, kRows = kBuilt.rows, kKeys = kBuilt.keys;
    static constexpr int kConsumers = kBuilt.consumers, kConsumerThreads = 128 * kConsumers;
    static constexpr int kThreads = 128 + kConsumerThreads;
    static constexpr int kDoutStages = kBuilt.dout_stages;
    static constexpr bool kWide = kBuilt.wide();
    // A multiprocessor's registers are shared unequally: the warps that move data need few.
    static constexpr int kMoverRegisters = kConsumers == 2 ? 24 : 32;
    static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 160;

    using Key = SwizzledTile<T, kKeys, divide_up(kWidth, kKeyPanelCols) * kKeyPanelCols>;
    static_assert(Key::kPanelCols == kKeyPanelCols, "for the tensor maps");
    using Query = SwizzledTile<T, kRows, kWidth>;
    using Slope = SwizzledTile<T, kRows, kKeys>;  // ds, or p
    // There are two tiles of ds. Where p goes through shared memory too, there is one of each.
    static constexpr int kSlopes = 2;

    // A warpgroup computes 64 rows of dq or, where a step has only 64 rows, some panels of columns.
    // It passes kDqCols columns at a time to the warp that adds them up.
    static constexpr bool kByRows = kRows == 64 * kConsumers;
    static_assert(kByRows || (kRows == 64 && Key::kPanels % kConsumers == 0), "a part for each");
    static constexpr int kDqPasses = kByRows ? 1 : Key::kPanels / kConsumers;
    static constexpr int kDqCols = kByRows ? kWidth : kKeyPanelCols;
    static constexpr int kDqPart = 64 * kDqCols, kDqFloats = kRows * kWidth;

    static constexpr int kV = Key::kBytes;
    static constexpr int kQ = kV + Key::kBytes;
    static constexpr int kDout = kQ + kBwdSlots * Query::kBytes;
    static constexpr int kSlope = kDout + kDoutStages * Query::kBytes;
    static constexpr int kDq = kSlope + kSlopes * Slope::kBytes;
    static constexpr int kStats = kDq + 4 * kDqPart * kConsumers;
    static constexpr int kStatsBytes = 2 * kRows * 4;  // lse, then delta, of a block of rows
    static constexpr int kBarriers = kStats + kBwdSlots * kStatsBytes;
    static constexpr int kSharedBytes = kBarriers + 8 * (2 + 2 * kBwdSlots + 2 * kDoutStages);
    static_assert(kSharedBytes <= 227 * 1024, "what a CTA has");
};

constexpr auto kBwdBuilds = build_table<kBwdCount>([](auto number) {
    using Tiles = BwdTiles<__nv_bfloat16, number>;
    return Build{.name = kBwdRows[number].name,
                 .head_width = Tiles::kWidth,
                 .tile_m = Tiles::kRows,
                 .tile_n = Tiles::kKeys,
                 .tile_k = 0,
                 .stages = kBwdSlots,
                 .consumers = Tiles::kConsumers,
                 .cluster = 1,
                 .pingpong = false,
                 .threads = Tiles::kThreads,
                 .shared_bytes = Tiles::kSharedBytes,
                 .rule = kBwdRows[number].rule};
});

// Numbers of named barriers. The last three have one barrier for each consumer.
enum BwdBarrier : unsigned {
    kSlopesThere = 1,
    kSlopesRead = 2,
    kOwn = 3,
    kDqFull = 6,
    kDqEmpty = 9
};

// What a CTA works on, the same for all of its threads.
template <class Tiles>
struct BwdWork {
    int b, hk, block, j0;     // batch entry, key head, block of keys, its first key
    int group;                // query heads of the key head
    int first_block, blocks;  // blocks of rows that see some of the keys
    Band band;
    Range queries;

    __device__ explicit BwdWork(const BwdSm90& a) {
        const AttentionCall& call = a.p.call;
        const int heads = call.batch * call.Hk, together = a.heads_together;
        const int section = static_cast<int>(blockIdx.x) / (together * a.key_blocks);
        const int rest = static_cast<int>(blockIdx.x) % (together * a.key_blocks);
        const int here = min(together, heads - section * together);
        const int head = section * together + rest % here;
        // The first keys of a causal triangle have the most queries, so their blocks come first.
        // With `deterministic` a block of keys waits for later blocks, so the last block comes
        // first.
        block = a.p.deterministic ? a.key_blocks - 1 - rest / here : rest / here;
        b = head / call.Hk;
        hk = head % call.Hk;
        j0 = block * Tiles::kKeys;
        group = call.H / call.Hk;
        band = band_of(call, b);
        queries = band.queries(j0, Tiles::kKeys, Tiles::kRows);
        first_block = queries.first / Tiles::kRows;
        blocks = queries.last > queries.first
                     ? (queries.last - queries.first + Tiles::kRows - 1) / Tiles::kRows
                     : 0;
    }

    __device__ int steps() const { return group * blocks; }

    // How many blocks of keys add to a block of rows before this one.
    __device__ int turn(int row_block) const {
        const int last_row = (row_block + 1) * Tiles::kRows - 1;
        const int last_key = min(last_row + band.shift + band.right, band.count - 1);
        return last_key / Tiles::kKeys - block;
    }
};

// Walks the steps: blocks of rows of the first query head, then of the next.
struct BwdStep {
    int h, row_block, first, end;

    template <class Tiles>
    __device__ explicit BwdStep(const BwdWork<Tiles>& work)
        : h(work.hk * work.group),
          row_block(work.first_block),
          first(work.first_block),
          end(work.first_block + work.blocks) {}

    __device__ void advance() {
        if (++row_block == end) {
            row_block = first;
            ++h;
        }
    }
};

template <class Tiles>
struct BwdBarriers {
    uint64_t* base;

    __device__ explicit BwdBarriers(unsigned char* arena)
        : base(reinterpret_cast<uint64_t*>(arena + Tiles::kBarriers)) {}

    __device__ uint64_t* k() const { return base; }
    __device__ uint64_t* v() const { return base + 1; }
    __device__ uint64_t* q_full(int stage) const { return base + 2 + stage; }
    __device__ uint64_t* q_empty(int stage) const { return base + 2 + kBwdSlots + stage; }
    __device__ uint64_t* dout_full(int stage) const { return base + 2 + 2 * kBwdSlots + stage; }
    __device__ uint64_t* dout_empty(int stage) const {
        return dout_full(Tiles::kDoutStages) + stage;
    }

    // One thread calls this.
    __device__ void init() const {
        mbarrier_init(k(), 1);
        mbarrier_init(v(), 1);
        for (int i = 0; i < kBwdSlots; ++i) {
            mbarrier_init(q_full(i), 1);
            mbarrier_init(q_empty(i), 4 * Tiles::kConsumers);  // warps
        }
        for (int i = 0; i < Tiles::kDoutStages; ++i) {
            mbarrier_init(dout_full(i), 1);
            mbarrier_init(dout_empty(i), 4 * Tiles::kConsumers);
        }
        mbarrier_init_fence();
    }
};

template <class Tile>
__device__ __forceinline__ void load_panels(const Tile& tile, const TensorMap* map, uint64_t* bar,
                                            int h, int t, int b, CacheHint hint) {
#pragma unroll
    for (int panel = 0; panel < Tile::kPanels; ++panel)
        tma_load(tile.panel(panel), map, bar,
                 Coordinates<4>{{panel * Tile::kPanelCols, h, t, b}}, hint);
}

// One thread calls this. All blocks of keys read the blocks of rows, which therefore stay in L2;
// only one CTA reads these keys.
template <class T, class Tiles>
__device__ void load_tiles(const BwdSm90& a, const BwdWork<Tiles>& work, unsigned char* arena) {
    const BwdBarriers<Tiles> bars(arena);
    const int steps = work.steps();
    if (steps == 0) return;
    auto key_tile = [&](int offset) {
        return typename Tiles::Key{reinterpret_cast<T*>(arena + offset)};
    };
    auto query_tile = [&](int offset, int stage) {
        return typename Tiles::Query{
            reinterpret_cast<T*>(arena + offset + stage * Tiles::Query::kBytes)};
    };
    mbarrier_arrive_expect_tx(bars.k(), Tiles::Key::kBytes);
    load_panels(key_tile(0), &a.k, bars.k(), work.hk, work.j0, work.b, CacheHint::evict_first);

    PipelineState<kBwdSlots> q;
    PipelineState<Tiles::kDoutStages> dout;
    BwdStep at(work);
#pragma unroll 1
    for (int step = 0; step < steps; ++step, at.advance(), q.advance(), dout.advance()) {
        const int i0 = at.row_block * Tiles::kRows;
        mbarrier_wait(bars.q_empty(q.stage), q.phase ^ 1);
        mbarrier_arrive_expect_tx(bars.q_full(q.stage), Tiles::Query::kBytes + Tiles::kStatsBytes);
        load_panels(query_tile(Tiles::kQ, q.stage), &a.q, bars.q_full(q.stage), at.h, i0, work.b,
                    CacheHint::evict_last);
        const int64_t tile =
            (static_cast<int64_t>(work.b) * a.p.call.H + at.h) * a.row_blocks + at.row_block;
        bulk_load(arena + Tiles::kStats + q.stage * Tiles::kStatsBytes,
                  a.p.row_stats + tile * (2 * Tiles::kRows), Tiles::kStatsBytes,
                  bars.q_full(q.stage));
        if (step == 0) {
            mbarrier_arrive_expect_tx(bars.v(), Tiles::Key::kBytes);
            load_panels(key_tile(Tiles::kV), &a.v, bars.v(), work.hk, work.j0, work.b,
                        CacheHint::evict_first);
        }
        mbarrier_wait(bars.dout_empty(dout.stage), dout.phase ^ 1);
        mbarrier_arrive_expect_tx(bars.dout_full(dout.stage), Tiles::Query::kBytes);
        load_panels(query_tile(Tiles::kDout, dout.stage), &a.dout, bars.dout_full(dout.stage), at.h,
                    i0, work.b, CacheHint::evict_last);
    }
}

// One warp adds the parts of dq that one consumer leaves in shared memory at each step.
template <class Tiles>
__device__ void add_dq(const BwdSm90& a, const BwdWork<Tiles>& work, unsigned char* arena,
                       int consumer) {
    constexpr int kPasses = Tiles::kDqPasses, kCols8 = Tiles::kDqCols / 8;
    const float* part =
        reinterpret_cast<const float*>(arena + Tiles::kDq) + consumer * Tiles::kDqPart;
    const int rounds = work.steps() * kPasses;
    const bool adds = a.p.dq != nullptr && lane_index() == 0;
    BwdStep at(work);
    if (rounds > 0) named_barrier_arrive(kDqEmpty + consumer, 128 + 32);
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
        const int pass = round % kPasses, col8 = (consumer * kPasses + pass) * kCols8;
        const int64_t tile =
            (static_cast<int64_t>(work.b) * a.p.call.H + at.h) * a.row_blocks + at.row_block;
        int* turn = a.p.turns + 1 + tile * Tiles::kConsumers + consumer;
        named_barrier_sync(kDqFull + consumer, 128 + 32);
        if (adds) {
            if (a.p.deterministic && pass == 0) semaphore_wait(turn, work.turn(at.row_block));
            float* sum = a.p.dq_sum + tile * Tiles::kDqFloats +
                         (Tiles::kByRows ? dq_index(Tiles::kWidth, consumer, 0, 0)
                                         : dq_index(Tiles::kWidth, 0, col8, 0));
            // Columns past the width were multiplied, but they are not added.
            const int cols8 =
                Tiles::kByRows ? kCols8 : min(kCols8, Tiles::kWidth / 8 - col8);
            bulk_reduce_add(sum, part, static_cast<unsigned>(cols8) * 128 * 16);
            bulk_commit();
            bulk_wait_read<0>();
        }
        __syncwarp();
        if (round + 1 < rounds) named_barrier_arrive(kDqEmpty + consumer, 128 + 32);
        if (pass + 1 < kPasses) continue;
        if (adds && a.p.deterministic) {
            bulk_wait<0>();
            semaphore_release(turn, 1);
        }
        at.advance();
    }
}

}  // namespace gk
