// The GELU MLP's products on Hopper: what gelu_mlp/products.cu makes, by TMA, wgmma and warp
// specialisation.
//
//     D (m, n) = A B in the three operand layouts of gelu_mlp/params.h, in bf16 or fp16,
//     accumulated in fp32
//     forward    out = D + bias (m, n) and activation = gelu(out) (m, n), either may be absent
//     backward   out = D gelu'(h) (m, n), activation = gelu(h), partial: column sums of out as
//                stored, of 64 rows each; without h: out = D
//     weight     out = D, or, k in parts, partial (splits, m, n) fp32
//
// Bytes: each CTA reads its tiles' operands once, half of B where two CTAs of a cluster share it;
// h, out and activation pass once, through shared memory. Saved: nothing but h, which is `out` of
// the forward product.
//
// Three kinds of warps meet at barriers in shared memory:
//     one loads A and B into a ring of stages               full[stage], empty[stage]
//     two warpgroups multiply and turn results into units of 64 rows of 128 bytes
//     one for each of them brings h and takes units away    ready[slot], done[slot]
// A grid has a cluster for each place on the chip; it walks over tiles until there are none. Where
// the two warpgroups are cooperative each has half of a tile's rows; where they play ping-pong they
// take tiles in turn, and the epilogue of one runs under the products of the other.
#pragma once

#include <iterator>

#include "gelu_mlp/params.h"
#include "runtime/choose.h"
#include "runtime/tensor_map.h"

namespace gk {

constexpr int kUnitRows = 64;         // what one wgmma makes
constexpr int kUnitRowBytes = 128;    // the span of the swizzle
constexpr int kUnitBytes = kUnitRows * kUnitRowBytes;
constexpr int kUnitCols = kUnitRowBytes / 2;  // of 16 bits; of fp32 half as many
constexpr int kProductStep = 64;              // along k, of a stage

// A CTA's tile of D, kM x kN, in steps of kK along k, kStages of which are in flight; kCluster
// CTAs, one below the other, share B.
template <int kTileM, int kTileN, int kTileStages, int kTileCluster, bool kTurns>
struct ProductTile {
    static constexpr int kM = kTileM, kN = kTileN, kK = kProductStep, kStages = kTileStages;
    static constexpr int kCluster = kTileCluster;
    static constexpr bool kPingpong = kTurns;
    static constexpr int kConsumers = 2;
    static constexpr int kRows = kPingpong ? kM : kM / kConsumers;  // of D that a consumer makes
    static constexpr int kBlocks = kRows / kUnitRows;
    static constexpr int kThreads = 128 * (1 + kConsumers);

    static constexpr int kABytes = kM * kK * 2, kBBytes = kN * kK * 2;
    static constexpr int kStageBytes = kABytes + kBBytes;
    static constexpr int kBarrierBytes = 512;
    // Of units, for each consumer: with two outputs the next two pairs where there is room, so that
    // one is filled while the other is on its way.
    static constexpr int kRoom = 227 * 1024 - kStages * kStageBytes - kBarrierBytes;
    static constexpr int kSlots = kRoom >= kConsumers * 4 * kUnitBytes ? 4 : 2;
    static constexpr int kSharedBytes =
        kStages * kStageBytes + kConsumers * kSlots * kUnitBytes + kBarrierBytes;
    static_assert(kRoom >= kConsumers * 2 * kUnitBytes, "a unit of each of two outputs");

    // Registers of a thread that loads or stores, and of one that multiplies.
    static constexpr int kFewRegisters = 40, kManyRegisters = 232;
};

// What the kernel is built of, by number.
struct ProductRow {
    const char* name;
    int tile_m, tile_n, stages, cluster;
    bool pingpong;
    Rule rule;
};

constexpr ProductRow kProductRows[] = {
    {"128x256, cooperative, cluster of 2", 128, 256, 4, 2, false, Rule::always},
    {"128x192, ping-pong, cluster of 2", 128, 192, 4, 2, true, Rule::always},
    {"128x128, cooperative", 128, 128, 4, 1, false, Rule::always},
    {"128x256, cooperative", 128, 256, 4, 1, false, Rule::never},
    {"128x192, cooperative, cluster of 2", 128, 192, 4, 2, false, Rule::never},
    {"256x128, cooperative, cluster of 2", 256, 128, 4, 2, false, Rule::never},
    {"64x256, ping-pong", 64, 256, 4, 1, true, Rule::never},
};
constexpr int kProductCount = std::size(kProductRows);

template <int kNumber>
struct ProductBuild
    : ProductTile<kProductRows[kNumber].tile_m, kProductRows[kNumber].tile_n,
                  kProductRows[kNumber].stages, kProductRows[kNumber].cluster,
                  kProductRows[kNumber].pingpong> {};

constexpr auto kProductBuilds = build_table<kProductCount>([](auto number) {
    using Tile = ProductBuild<number>;
    return Build{.name = kProductRows[number].name,
                 .head_width = 0,
                 .tile_m = Tile::kM,
                 .tile_n = Tile::kN,
                 .tile_k = Tile::kK,
                 .stages = Tile::kStages,
                 .consumers = Tile::kConsumers,
                 .cluster = Tile::kCluster,
                 .pingpong = Tile::kPingpong,
                 .threads = Tile::kThreads,
                 .shared_bytes = Tile::kSharedBytes,
                 .rule = kProductRows[number].rule};
});

struct ProductSm90 {
    TensorMap a, b;
    TensorMap out;         // (m, n), or (splits, m, n) fp32
    TensorMap activation;  // (m, n)
    TensorMap h;           // (m, n)
    const void* bias;      // (n,) or absent
    float* partial;        // (ceil(m / 64), n) column sums, or absent
    int64_t m, n;
    unsigned steps, splits;           // along k
    unsigned tiles_m, tiles_n, group; // tiles_m of whole clusters; `group` of them run together
    unsigned items;                   // tiles and parts of k
    bool has_out, has_activation, has_h, tanh;

    // Slots that one unit takes.
    __host__ __device__ int outputs() const { return has_out && has_activation ? 2 : 1; }
};

// A product by the build of a choice. One translation unit for each layout.
template <Layout kLayout>
void launch_product_sm90(DType dtype, const Product& p, const ProductChoice& choice,
                         Stream stream);

}  // namespace gk
