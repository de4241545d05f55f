// How attention forward is built for Hopper: its tiles, its roles and the arguments of a launch.
// The kernel is in attention/fwd/sm90/kernel.h, the choice among the builds in
// attention/fwd/sm90/launch.cu.
#pragma once

#include "attention/scores.h"
#include "attention/sm90.h"
#include "runtime/choose.h"
#include "device/mma.h"
#include "device/swizzled.h"

namespace gk {

constexpr int kWarpgroup = 128;     // threads that multiply together
constexpr int kWarpgroupRows = 64;  // queries of a warpgroup: the rows of a wgmma
constexpr int kFwdSm90Stages = 2;   // blocks of keys, and as many of values, in shared memory
constexpr int kSharedLimitSm90 = 227 * 1024;

// The tiles for heads up to kHeadWidth wide in T: blocks of kTileKeys keys, and kWarpgroups
// consumers with 64 queries each. With kTurns the consumers take turns at the tensor cores.
template <class T, int kHeadWidth, int kTileKeys, int kWarpgroups, bool kTurns>
struct FwdSm90Tiles {
    using Type = T;
    static constexpr int kWidth = kHeadWidth, kKeys = kTileKeys, kConsumers = kWarpgroups;
    static constexpr bool kPingPong = kTurns;
    static constexpr int kRows = kWarpgroupRows * kConsumers;
    static constexpr unsigned kThreads = kWarpgroup * (kConsumers + 1);
    // How a multiprocessor's 65,536 registers are shared: the producer needs few (with 24 it
    // spills), and the consumers take the rest.
    static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
    static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
    static_assert(kConsumers == 2 || kConsumers == 3, "registers are shared out for 2 or 3");
    // Wide heads have so much of o to rescale that this is better done under the product q k^T.
    static constexpr bool kRescaleFirst = kWidth > 128;

    using Query = SwizzledTile<T, kWarpgroupRows, kWidth>;  // the tile of one consumer, for out too
    using Key = SwizzledTile<T, kKeys, kWidth>;             // for values too
    using Weights = typename Mma<T>::A;                     // for 16 keys

    static constexpr int kKeyBytes = 2 * kFwdSm90Stages * Key::kBytes;
    static constexpr int kQueryBytes = kConsumers * Query::kBytes;
    // A full and an empty barrier for k and for v of each stage, and for q of each consumer.
    static constexpr int kBarriers = 4 * kFwdSm90Stages + 2 * kConsumers;
    static constexpr int kBarrierBytes = kBarriers * static_cast<int>(sizeof(uint64_t));
    // Where there is room, out leaves through tiles of its own, so that the next q can arrive
    // meanwhile. Otherwise out leaves through q's tiles.
    static constexpr bool kOutApart =
        kKeyBytes + 2 * kQueryBytes + kBarrierBytes <= kSharedLimitSm90;
    static constexpr int kSharedBytes =
        kKeyBytes + (kOutApart ? 2 : 1) * kQueryBytes + kBarrierBytes;
    static_assert(kSharedBytes <= kSharedLimitSm90, "what a CTA may have");
};

// A build of the kernel; its index in kFwdRows is its number.
struct FwdRow {
    const char* name;
    int width, keys, consumers;  // the widest head; keys of a block; warpgroups that multiply
    bool pingpong;
    Rule rule;
};

// For each head width the build that the rule prefers comes first. The tiles are those of
// FlashAttention-3 (hopper/tile_size.h there) where their weights fit in registers; options need
// registers too.
constexpr FwdRow kFwdRows[] = {
    {"D64 192x128, 3 consumers, ping-pong", 64, 128, 3, true, Rule::always},
    {"D64 192x128, 3 consumers", 64, 128, 3, false, Rule::never},
    {"D64 128x128, 2 consumers, ping-pong", 64, 128, 2, true, Rule::never},
    {"D64 128x192, 2 consumers, ping-pong", 64, 192, 2, true, Rule::never},
    {"D96 128x128, 2 consumers, ping-pong", 96, 128, 2, true, Rule::always},
    {"D96 192x96, 3 consumers, ping-pong", 96, 96, 3, true, Rule::never},
    {"D128 128x128, 2 consumers, ping-pong", 128, 128, 2, true, Rule::always},
    {"D128 128x176, 2 consumers, ping-pong", 128, 176, 2, true, Rule::plain},
    {"D128 128x128, 2 consumers", 128, 128, 2, false, Rule::never},
    {"D128 192x80, 3 consumers, ping-pong", 128, 80, 3, true, Rule::never},
    {"D192 128x112, 2 consumers", 192, 112, 2, false, Rule::plain},
    {"D192 128x80, 2 consumers", 192, 80, 2, false, Rule::options},
    {"D256 128x80, 2 consumers", 256, 80, 2, false, Rule::plain},
    {"D256 128x64, 2 consumers", 256, 64, 2, false, Rule::options},
};
constexpr int kFwdCount = std::size(kFwdRows);

template <class T, int kNumber>
using FwdTilesOf = FwdSm90Tiles<T, kFwdRows[kNumber].width, kFwdRows[kNumber].keys,
                                kFwdRows[kNumber].consumers, kFwdRows[kNumber].pingpong>;

constexpr auto kFwdBuilds = build_table<kFwdCount>([](auto number) {
    using Tiles = FwdTilesOf<__nv_bfloat16, number>;
    return Build{.name = kFwdRows[number].name,
                 .head_width = Tiles::kWidth,
                 .tile_m = Tiles::kRows,
                 .tile_n = Tiles::kKeys,
                 .tile_k = 0,
                 .stages = kFwdSm90Stages,
                 .consumers = Tiles::kConsumers,
                 .cluster = 1,
                 .pingpong = Tiles::kPingPong,
                 .threads = Tiles::kThreads,
                 .shared_bytes = Tiles::kSharedBytes,
                 .rule = kFwdRows[number].rule};
});

struct FwdSm90Arguments {
    AttentionFwd p;
    TensorMap q, k, v, out;
    bool paired;              // whether an item is two tiles rather than one
    unsigned items;           // items of all heads of the batch
    unsigned items_of_head;
    unsigned rounds;          // rounds in which every CTA gets an item
    unsigned row_blocks;      // tiles of a head, of Tiles::kRows queries
    unsigned heads;           // heads of all batch entries
    unsigned heads_together;  // heads of the batch whose k and v share the L2 cache
};

// build: the number of a build for heads of this width. Each pair of T and kWidth is compiled in a
// translation unit of its own.
template <class T, int kWidth>
void launch_attention_fwd_sm90_of(const AttentionFwd& p, int build, Stream stream);

}  // namespace gk
