// LayerNorm forward; formulas, shapes and bytes are in layer_norm/params.h.
//
// A row is read once and stays in registers, in the dtype of s, through both passes of the
// statistics. One warp takes a row of up to 1,792 columns (every GPT-2 width). Several warps share
// a wider row: 16 warps hold up to 32,768 columns of a 16-bit s or 28,672 of an fp32 one. Still
// wider rows go through the same kernel in chunks, which the second and third passes read again
// from L2.
#include <algorithm>

#include "layer_norm/fwd_row.h"
#include "layer_norm/sm90/choice.h"
#include "runtime/dry_run.h"

namespace gk {
namespace {

constexpr int kMaxWarps = 16;
constexpr int kRowsOfCta = 4;  // rows of one warp each
constexpr int kChunk = 4;      // groups of a thread, for a row too wide for registers
constexpr size_t kSharedBytes = kMaxWarps * (sizeof(float) + sizeof(float2));

// Sums over a team, in a CTA of one or several teams.
struct TeamTotal {
    int warps;        // warps of a team
    float2* scratch;  // kMaxWarps of them, then as many floats

    __device__ __forceinline__ float operator()(float sum) const {
        return team_sum(sum, warps, reinterpret_cast<float*>(scratch + kMaxWarps));
    }
    __device__ __forceinline__ float2 operator()(float2 sums) const {
        return team_sum(sums, warps, scratch);
    }
};

// Each team takes a row. A CTA has several teams of one warp, or one team of several warps.
template <class X, class S, int kGroups, bool kAligned, bool kChunks>
__global__ void __launch_bounds__(32 * kMaxWarps)
    layer_norm_fwd_kernel(const __grid_constant__ Fwd p) {
    const Team team(p.warps);
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / team.threads) + team.index;
    if (row >= p.op.rows) return;  // whole warps, which share no barrier with other warps
    const TeamTotal total{p.warps, reinterpret_cast<float2*>(shared_memory())};
    normalise_row<X, S, kGroups, kAligned, kChunks>(p, team, row, total);
}

using Kernel = void (*)(Fwd);

// The kernel for rows of this many groups a thread.
template <class X, class S>
Kernel kernel_of(int groups, bool is_aligned) {
    if (!is_aligned)
        return groups <= 2 ? layer_norm_fwd_kernel<X, S, 2, false, false>
                           : layer_norm_fwd_kernel<X, S, 2, false, true>;
    switch (groups) {
        case 1: return layer_norm_fwd_kernel<X, S, 1, true, false>;
        case 2: return layer_norm_fwd_kernel<X, S, 2, true, false>;
        case 3: return layer_norm_fwd_kernel<X, S, 3, true, false>;
        case 4: return layer_norm_fwd_kernel<X, S, 4, true, false>;
        case 5: return layer_norm_fwd_kernel<X, S, 5, true, false>;
        case 6:
        case 7: return layer_norm_fwd_kernel<X, S, 7, true, false>;
    }
    if constexpr (sizeof(S) == 2)
        if (groups == 8) return layer_norm_fwd_kernel<X, S, 8, true, false>;
    return layer_norm_fwd_kernel<X, S, kChunk, true, true>;
}

}  // namespace

void launch_layer_norm_fwd(const LayerNormFwd& op, int build, Stream stream) {
    if (op.sum_dtype != DType::f32 &&
        (op.sum_dtype != op.x_dtype ||
         (op.residual != nullptr && op.residual_dtype == DType::f32)))
        throw Error("layer_norm_fwd on " + shape_of(op) +
                    ": the sum must have the dtype of x, or fp32, which a fp32 residual needs");
    const Choice choice = choose_layer_norm_fwd(op, build, stream.device);
    if (choice.build != kAnyGpu) return launch_layer_norm_fwd_sm90(op, choice.build, stream);
    dry_run_refused(kLayerNormFwdSm90, choice.reason);
    const bool aligned_rows = is_aligned(op);
    const int groups = lane_groups(op.cols);
    const int most = aligned_rows ? 7 : 2, usual = aligned_rows ? 4 : 2;  // one warp; several warps
    const int warps = groups <= most ? 1 : std::min(divide_up(groups, usual), kMaxWarps);
    const int rows = warps == 1 ? kRowsOfCta : 1;
    Launch launch{};
    launch.name = "layer_norm_fwd";
    launch.shape = shape_of(op);
    launch.grid = grid_of(launch.name, launch.shape, divide_up(op.rows, rows));
    launch.threads = 32 * warps * rows;
    launch.shared_bytes = warps == 1 ? 0 : kSharedBytes;
    launch.stream = stream;
    dispatch_sum(op.x_dtype, op.sum_dtype, [&](auto x, auto s) {
        const Kernel kernel =
            kernel_of<decltype(x), decltype(s)>(divide_up(groups, warps), aligned_rows);
        gk::launch(kernel, launch, Fwd{op, Divisor(op.cols), warps, 1});
    });
}

}  // namespace gk
