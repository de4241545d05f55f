// LayerNorm backward of wide rows by clusters; formulas, shapes and bytes are in
// layer_norm/params.h.
//
// A cluster of two, four or eight CTAs shares a row: thread t of all T holds the groups t, t + T, t
// + 2T ... The cluster works as one CTA does on a narrower row (layer_norm/bwd_row.h), and keeps
// its share of dweight and dbias for all columns in its registers. So dy and s are read once, where
// without clusters another kernel reads them again for dweight and dbias. Three tensors are moved
// instead of five, or with dsum four instead of six.
#include "device/cluster_reduce.h"
#include "layer_norm/bwd_row.h"
#include "layer_norm/sm90/choice.h"
#include "runtime/resident.h"

namespace gk {
namespace {

// How many CTAs the registers allow on an SM. Where a thread holds two groups there are two, and
// one works while the other waits at a barrier.
constexpr int ctas_of_sm(int groups, bool aligned_rows) {
    return groups == 2 && aligned_rows ? 2 : 1;
}

// Sums over the cluster. The turns alternate between the two halves of the scratch memory.
struct ClusterTotal {
    int ctas;
    float2* scratch;

    __device__ __forceinline__ float2 operator()(float2 sums, int turn) const {
        return cluster_sum(sums, ctas, scratch + turn * ctas * blockDim.x / 32);
    }
};

template <class X, class S, int kGroups, bool kAligned>
__global__ void __launch_bounds__(kBwdClusterThreads, ctas_of_sm(kGroups, kAligned))
    layer_norm_bwd_sm90_kernel(const __grid_constant__ Bwd p) {
    cluster_arrive();
    const Team team(cluster_rank(), p.ctas);
    const int cluster = blockIdx.x / p.ctas, clusters = gridDim.x / p.ctas;
    const Rows rows{cluster, clusters, 1, cluster};
    const unsigned scratch = 2 * sizeof(float2) * p.ctas * blockDim.x / 32;
    const ClusterTotal total{p.ctas, reinterpret_cast<float2*>(shared_memory())};
    cluster_wait();  // until all CTAs run
    gradients_of_rows<X, S, kGroups, kAligned, kBwdClusterThreads>(
        p, team, rows, shared_memory() + scratch, total);
}

using Kernel = void (*)(Bwd);

template <class X, class S>
Kernel kernel_of(int groups, bool aligned_rows) {
    if (!aligned_rows) return layer_norm_bwd_sm90_kernel<X, S, 2, false>;
    if (groups == 2) return layer_norm_bwd_sm90_kernel<X, S, 2, true>;
    return layer_norm_bwd_sm90_kernel<X, S, 4, true>;
}

static_assert(bytes_of_rows<float, float, kBwdClusterThreads>(4, true, true) ==
              kMostBytesOfBwdRows);

template <class X, class S>
Launch launch_of(const ClusterRow& row, bool aligned_rows, bool dsum) {
    Launch launch{};
    launch.name = kLayerNormBwdSm90;
    launch.threads = 32 * row.warps;
    launch.shared_bytes = bwd_scratch_bytes(row.ctas, row.warps) +
                          bytes_of_rows<X, S, kBwdClusterThreads>(row.groups, aligned_rows, dsum);
    launch.cluster = row.ctas;
    return launch;
}

}  // namespace

int layer_norm_bwd_sm90_partials(int64_t rows, int cols, int device, int build) {
    const bool aligned_rows = in_groups(cols);
    const int number = layer_norm_bwd_sm90_build(cols, aligned_rows, build);
    if (number == kAnyGpu) return 0;
    const ClusterRow row = layer_norm_bwd_row(cols, aligned_rows, number);
    // As many clusters as run at a time, since each cluster has the same number of rows. The widest
    // dtypes stand for all, since registers, not these bytes, limit how many CTAs an SM holds.
    Launch launch = launch_of<float, float>(row, aligned_rows, true);
    launch.shape = "x " + shape_of(rows, cols);
    launch.stream.device = device;
    const int clusters = resident_clusters(kernel_of<float, float>(row.groups, aligned_rows),
                                           launch, ctas_of_sm(row.groups, aligned_rows));
    return static_cast<int>(std::min<int64_t>(rows, clusters));
}

void launch_layer_norm_bwd_sm90(const LayerNormBwd& op, int build, Stream stream) {
    const bool aligned_rows = is_aligned(op);
    const ClusterRow row = layer_norm_bwd_row(op.cols, aligned_rows, build);
    dispatch_sum(op.x_dtype, op.sum_dtype, [&](auto x, auto s) {
        using X = decltype(x);
        using S = decltype(s);
        Launch launch = launch_of<X, S>(row, aligned_rows, op.dsum != nullptr);
        launch.shape = shape_of(op);
        launch.grid =
            grid_of(launch.name, launch.shape, static_cast<int64_t>(op.partials) * row.ctas);
        launch.stream = stream;
        launch.tiles = op.rows * row.ctas;
        launch.built = layer_norm_bwd_builds()[build];
        gk::launch(kernel_of<X, S>(row.groups, aligned_rows), launch,
                   Bwd{op, Divisor(op.cols), row.warps, row.ctas});
    });
    if (op.partial_dweight != nullptr || op.partial_dbias != nullptr)
        launch_layer_norm_bwd_reduce(op, stream);
}

}  // namespace gk
