// LayerNorm forward of wide rows by clusters; formulas, shapes and bytes are in
// layer_norm/params.h.
//
// A cluster of two, four or eight CTAs shares a row, which stays in registers: thread t of all T
// holds the groups t, t + T, t + 2T ... The sums of each pass reach every CTA's shared memory by
// one barrier of the cluster. So a row is read once up to 131,072 columns (262,144 of a 16-bit s),
// many more than one CTA can hold. For narrower rows, where one CTA would fill an SM and leave
// memory idle while it adds up, an SM holds CTAs of several rows.
#include "device/cluster_reduce.h"
#include "layer_norm/fwd_row.h"
#include "layer_norm/sm90/choice.h"

namespace gk {
namespace {

constexpr int kMaxWarps = 16;
// Sums over the cluster: first of a float, then of a float2.
struct ClusterTotal {
    int ctas;
    unsigned char* scratch;

    __device__ __forceinline__ float operator()(float sum) const {
        cluster_wait();  // until all CTAs run
        return cluster_sum(sum, ctas, reinterpret_cast<float*>(scratch));
    }
    __device__ __forceinline__ float2 operator()(float2 sums) const {
        const unsigned bytes = ctas * blockDim.x / 32 * sizeof(float);
        return cluster_sum(sums, ctas, reinterpret_cast<float2*>(scratch + bytes));
    }
};

// Each cluster takes a row.
template <class X, class S, int kGroups, bool kAligned>
__global__ void __launch_bounds__(32 * kMaxWarps)
    layer_norm_fwd_sm90_kernel(const __grid_constant__ Fwd p) {
    cluster_arrive();
    const Team team(cluster_rank(), p.ctas);
    const ClusterTotal total{p.ctas, shared_memory()};
    normalise_row<X, S, kGroups, kAligned, false>(p, team, blockIdx.x / p.ctas, total);
}

using Kernel = void (*)(Fwd);

template <class X, class S>
Kernel kernel_of(int groups, bool aligned_rows) {
    if (!aligned_rows) return layer_norm_fwd_sm90_kernel<X, S, 2, false>;
    if (groups == 2) return layer_norm_fwd_sm90_kernel<X, S, 2, true>;
    if constexpr (sizeof(S) == 2)
        if (groups == 8) return layer_norm_fwd_sm90_kernel<X, S, 8, true>;
    return layer_norm_fwd_sm90_kernel<X, S, 4, true>;
}

}  // namespace

void launch_layer_norm_fwd_sm90(const LayerNormFwd& op, int build, Stream stream) {
    const ClusterRow row = layer_norm_fwd_row(op, build);
    Launch launch{};
    launch.name = kLayerNormFwdSm90;
    launch.shape = shape_of(op);
    launch.grid = grid_of(launch.name, launch.shape, op.rows * row.ctas);
    launch.threads = 32 * row.warps;
    launch.shared_bytes = row.ctas * row.warps * (sizeof(float) + sizeof(float2));
    launch.stream = stream;
    launch.cluster = row.ctas;
    launch.built = layer_norm_fwd_builds()[build];
    dispatch_sum(op.x_dtype, op.sum_dtype, [&](auto x, auto s) {
        gk::launch(kernel_of<decltype(x), decltype(s)>(row.groups, is_aligned(op)), launch,
                   Fwd{op, Divisor(op.cols), row.warps, row.ctas});
    });
}

}  // namespace gk
