// The GELU MLP's products on Hopper: those of gelu_mlp/products.cu, by TMA, wgmma and warp
// specialisation.
//
//     D (m, n) = A B in the three operand layouts of gelu_mlp/params.h, in bf16 or fp16,
//     accumulated in fp32
//     forward    out = D + bias (m, n) and activation = gelu(out) (m, n), either may be absent
//     backward   out = D gelu'(h) (m, n), activation = gelu(h), partial: column sums of out as
//                stored, of 64 rows each; without h: out = D, or total = addend + D in fp32
//     weight     out = D, or, with k split, partial (splits, m, n) fp32
//
// Bytes: each CTA reads its tiles' operands once, but only half of B where two CTAs of a cluster
// share it; h, out and activation pass once, through shared memory. Saved: h alone, which is `out`
// of the forward product.
//
// Three kinds of warps meet at barriers in shared memory:
//     one loads A and B into a ring of stages               full[stage], empty[stage]
//     two warpgroups multiply and turn results into units of 64 rows of 128 bytes
//     one for each of the two loads h and stores units      ready[slot], done[slot]
// A grid has one cluster for each place on the chip. Each cluster takes one tile after another
// until there are none. If the two warpgroups are cooperative, each has half of a tile's rows. In
// ping-pong they take tiles in turn, and the epilogue of one runs under the products of the other.
#pragma once

#include <iterator>

#include "gelu_mlp/params.h"
#include "runtime/choose.h"
#include "runtime/tensor_map.h"

namespace gk {

constexpr int kUnitRows = 64;         // rows that one wgmma computes
constexpr int kUnitRowBytes = 128;    // the span of the swizzle
constexpr int kUnitBytes = kUnitRows * kUnitRowBytes;
constexpr int kUnitCols = kUnitRowBytes / 2;  // of 16-bit elements; half as many of fp32
constexpr int kProductStep = 64;              // along k, of a stage

// A CTA's tile of D, kM x kN, in steps of kK along k, of which kStages are in flight. kCluster
// CTAs, one below the other in D, share B.
template <int kTileM, int kTileN, int kTileStages, int kTileCluster, bool kTurns>
struct ProductTile {
    static constexpr int kM = kTileM, kN = kTileN, kK = kProductStep, kStages = kTileStages;
    static constexpr int kCluster = kTileCluster;
    static constexpr bool kPingpong = kTurns;
    static constexpr int kConsumers = 2;
    static constexpr int kRows = kPingpong ? kM : kM / kConsumers;  // of D, for one consumer
    static constexpr int kBlocks = kRows / kUnitRows;
    static constexpr int kThreads = 128 * (1 + kConsumers);

    static constexpr int kABytes = kM * kK * 2, kBBytes = kN * kK * 2;
    static constexpr int kStageBytes = kABytes + kBBytes;
    static constexpr int kBarrierBytes = 512;
    // Each consumer has kSlots slots for units: with two outputs, room for two pairs of units where
    // that fits, so that one pair is filled while the other is being stored.
    static constexpr int kRoom = 227 * 1024 - kStages * kStageBytes - kBarrierBytes;
    static constexpr int kSlots = kRoom >= kConsumers * 4 * kUnitBytes ? 4 : 2;
    static constexpr int kSharedBytes =
        kStages * kStageBytes + kConsumers * kSlots * kUnitBytes + kBarrierBytes;
    static_assert(kRoom >= kConsumers * 2 * kUnitBytes, "a unit of each of two outputs");

    // Registers of a thread that loads or stores, and of one that multiplies.
    static constexpr int kFewRegisters = 40, kManyRegisters = 232;
};

// A build of the kernel; its index in kProductRows is its number.
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
    TensorMap out;         // (m, n), or (splits, m, n) fp32 where it is wide
    TensorMap activation;  // (m, n)
    TensorMap h;           // (m, n), or what is added, in fp32, where the output is wide
    const void* bias;      // (n,) or absent
    float* partial;        // (ceil(m / 64), n) column sums, or absent
    int64_t m, n;
    unsigned steps, splits;           // steps along k; splits of k
    unsigned tiles_m, tiles_n, group; // tiles_m: clusters; `group` of them run together
    unsigned items;                   // tiles times splits
    bool has_out, has_activation, has_h, tanh;
    bool wide;  // the output is fp32

    // How many slots one unit takes.
    __host__ __device__ int outputs() const { return has_out && has_activation ? 2 : 1; }
};

// Launches the build of a choice. Each layout is compiled in a translation unit of its own.
template <Layout kLayout>
void launch_product_sm90(DType dtype, const Product& p, const ProductChoice& choice,
                         Stream stream);

}  // namespace gk
