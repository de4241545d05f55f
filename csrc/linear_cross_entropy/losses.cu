// The losses of linear_cross_entropy, from what each tile of classes adds to them.
//
//     highest, exponential (tiles, N)    lse = log sum over the tiles of exponential exp(highest)
//     sum (tiles, N)                     mean(l) = the sum over the tiles / V
//     at_target (N,)                     l[target]
//     loss = lse - (1 - smoothing) l[target] - smoothing mean(l) + z_loss lse^2
//
// All fp32. It reads 8 bytes for each row and tile, 12 with label smoothing. Saved for the backward
// pass: lse. The order of the sums never changes.
#include "linear_cross_entropy/row.h"
#include "runtime/launch.h"

namespace gk {
namespace {

// A CTA has 32 rows, one for each lane, so that a warp reads neighbouring numbers. Each of its
// warps adds up every kWarps-th tile.
constexpr int kWarps = 8, kRows = 32;

__global__ void __launch_bounds__(kWarps * 32)
    linear_cross_entropy_losses_kernel(const __grid_constant__ LossSums p) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + lane;
    ExpSum found;
    float sum = 0.0f;
    if (row < p.rows) {
#pragma unroll 4
        for (int64_t tile = warp; tile < p.tiles; tile += kWarps) {
            const int64_t at = tile * p.rows + row;
            found.add({p.highest[at], p.exponential[at]});
            if (p.sum != nullptr) sum += p.sum[at];
        }
    }
    float* highest = reinterpret_cast<float*>(shared_memory());  // (kWarps, kRows)
    float* exponential = highest + kWarps * kRows;
    float* sums = exponential + kWarps * kRows;
    const int mine = static_cast<int>(threadIdx.x);
    highest[mine] = found.highest;
    exponential[mine] = found.exponential;
    sums[mine] = sum;
    __syncthreads();
    if (warp > 0 || row >= p.rows) return;
    for (int other = lane + kRows; other < kWarps * kRows; other += kRows) {
        found.add({highest[other], exponential[other]});
        sum += sums[other];
    }
    const float lse = shift_of(found.highest) + logf(found.exponential);
    p.lse[row] = lse;
    const int64_t target = p.targets[row];
    float loss = target == p.options.ignore_index ? 0.0f : NAN;
    if (has_gradient(target, p.classes, p.options)) {
        const float smoothing = p.options.label_smoothing;
        loss = lse - (1.0f - smoothing) * p.at_target[row] + p.options.z_loss * lse * lse;
        if (p.sum != nullptr) loss -= smoothing * (sum / static_cast<float>(p.classes));
    }
    p.losses[row] = loss;
}

}  // namespace

void launch_linear_cross_entropy_losses(const LossSums& p, Stream stream) {
    constexpr const char* kName = "linear_cross_entropy losses";
    const std::string shape = shape_of(p.tiles, p.rows) + " fp32";
    launch(linear_cross_entropy_losses_kernel,
           {kName, shape, grid_of(kName, shape, divide_up(p.rows, kRows)), kWarps * 32,
            3 * kWarps * kRows * sizeof(float), stream},
           p);
}

}  // namespace gk
