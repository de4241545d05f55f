// How attention forward is built for Hopper: tiles, roles, what a launch takes. The kernel is in
// attention/fwd/sm90/kernel.h, the choice among ways to build it in attention/fwd/sm90/launch.cu.
#pragma once

#include "attention/scores.h"
#include "attention/sm90.h"
#include "runtime/build.h"
#include "device/mma.h"
#include "device/swizzled.h"

namespace gk {

constexpr int kWarpgroup = 128;     // threads that multiply together
constexpr int kWarpgroupRows = 64;  // queries of a warpgroup: the rows of a wgmma
constexpr int kFwdSm90Stages = 2;   // blocks of keys, and as many of values, in shared memory
constexpr int kSharedLimitSm90 = 227 * 1024;

// Head widths up to kHeadWidth in T; blocks of kTileKeys keys; kWarpgroups of consumers with 64
// queries each; with kTurns they take turns at the tensor cores.
template <class T, int kHeadWidth, int kTileKeys, int kWarpgroups, bool kTurns>
struct FwdSm90Tiles {
    using Type = T;
    static constexpr int kWidth = kHeadWidth, kKeys = kTileKeys, kConsumers = kWarpgroups;
    static constexpr bool kPingPong = kTurns;
    static constexpr int kRows = kWarpgroupRows * kConsumers;
    static constexpr unsigned kThreads = kWarpgroup * (kConsumers + 1);
    // A multiprocessor's 65,536 registers: the producer needs few (with 24 it spills), consumers
    // take what it gives.
    static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
    static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
    static_assert(kConsumers == 2 || kConsumers == 3, "registers are shared out for 2 or 3");
    // Wide heads have so much of o to rescale that it is better done under the product q k^T.
    static constexpr bool kRescaleFirst = kWidth > 128;

    using Query = SwizzledTile<T, kWarpgroupRows, kWidth>;  // of one consumer; out's too
    using Key = SwizzledTile<T, kKeys, kWidth>;             // values too
    using Weights = typename Mma<T>::A;                     // of 16 keys

    static constexpr int kKeyBytes = 2 * kFwdSm90Stages * Key::kBytes;
    static constexpr int kQueryBytes = kConsumers * Query::kBytes;
    // full and empty for k and for v of each stage, and for q of each consumer.
    static constexpr int kBarriers = 4 * kFwdSm90Stages + 2 * kConsumers;
    static constexpr int kBarrierBytes = kBarriers * static_cast<int>(sizeof(uint64_t));
    // out leaves by tiles of its own where there is room, so that the next q can come meanwhile;
    // else by q's.
    static constexpr bool kOutApart =
        kKeyBytes + 2 * kQueryBytes + kBarrierBytes <= kSharedLimitSm90;
    static constexpr int kSharedBytes =
        kKeyBytes + (kOutApart ? 2 : 1) * kQueryBytes + kBarrierBytes;
    static_assert(kSharedBytes <= kSharedLimitSm90, "what a CTA may have");
};

// The ways in which it is built, by the widest head that they take.
template <class T> using Fwd64 = FwdSm90Tiles<T, 64, 128, 3, true>;
template <class T> using Fwd64Apart = FwdSm90Tiles<T, 64, 128, 3, false>;
template <class T> using Fwd64Low = FwdSm90Tiles<T, 64, 128, 2, true>;
template <class T> using Fwd64Wide = FwdSm90Tiles<T, 64, 192, 2, true>;
template <class T> using Fwd96 = FwdSm90Tiles<T, 96, 128, 2, true>;
template <class T> using Fwd96High = FwdSm90Tiles<T, 96, 96, 3, true>;
template <class T> using Fwd128 = FwdSm90Tiles<T, 128, 128, 2, true>;
template <class T> using Fwd128Wide = FwdSm90Tiles<T, 128, 176, 2, true>;
template <class T> using Fwd128Apart = FwdSm90Tiles<T, 128, 128, 2, false>;
template <class T> using Fwd128High = FwdSm90Tiles<T, 128, 80, 3, true>;
template <class T> using Fwd192 = FwdSm90Tiles<T, 192, 112, 2, false>;
template <class T> using Fwd192Narrow = FwdSm90Tiles<T, 192, 80, 2, false>;
template <class T> using Fwd256 = FwdSm90Tiles<T, 256, 80, 2, false>;
template <class T> using Fwd256Narrow = FwdSm90Tiles<T, 256, 64, 2, false>;

struct FwdSm90Arguments {
    AttentionFwd p;
    TensorMap q, k, v, out;
    bool paired;              // whether an item is two tiles, or one
    unsigned items;           // of all heads of the batch
    unsigned items_of_head;
    unsigned rounds;          // in which every CTA gets an item
    unsigned row_blocks;      // tiles of a head, of Tiles::kRows queries
    unsigned heads;           // of all batch entries
    unsigned heads_together;  // heads of the batch whose k and v share the L2 cache
};

// kOptions: softcap or ALiBi, or a scale that is not positive (see scores_are_plain). Instantiated
// in attention/fwd/sm90/kernel_bf16.cu, _f16.cu and _builds.cu.
template <class Tiles, bool kOptions>
void launch_attention_fwd_sm90_tiles(const AttentionFwd& p, const Build& built, Stream stream);

}  // namespace gk
