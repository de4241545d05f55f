// How LayerNorm's cluster kernels divide a row, for their launchers (compute capability 9.0).
//
// A build names a cluster and the most threads of each of its CTAs. The number of columns and the
// kernels that exist then decide how many groups a thread holds, and how many warps are needed.
#pragma once

#include "layer_norm/shape.h"
#include "runtime/choose.h"

namespace gk {

constexpr const char* kLayerNormFwdSm90 = "layer_norm_fwd_sm90";
constexpr const char* kLayerNormBwdSm90 = "layer_norm_bwd_sm90";

constexpr int kBwdClusterThreads = 256;  // the most threads of a CTA of the backward kernels
// With more columns than this, the backward kernels for any GPU read dy and s twice.
constexpr int kMostColsOfBwdCta = 8192;

// How a cluster holds a row.
struct ClusterRow {
    int ctas;    // CTAs of the cluster
    int warps;   // warps of a CTA, each of which holds some of the row
    int groups;  // groups of a thread; 0: the row does not fit
};

ClusterRow layer_norm_fwd_row(const LayerNormFwd& op, int build);
ClusterRow layer_norm_bwd_row(int cols, bool aligned_rows, int build);

// The choice for a problem. Throws Error where the caller asks for a build that cannot run.
Choice choose_layer_norm_fwd(const LayerNormFwd& op, int build, int device);
Choice choose_layer_norm_bwd(const LayerNormBwd& op, int build, int device);

// The build for rows whose launch is not known yet; kAnyGpu where clusters do not take them.
int layer_norm_bwd_sm90_build(int cols, bool aligned_rows, int build);

// Bytes of the two scratch buffers in which a backward cluster adds up its sums, in turns.
constexpr size_t bwd_scratch_bytes(int ctas, int warps) {
    return 2 * sizeof(float2) * ctas * warps;
}
// The most bytes beside the scratch buffers: four groups a thread, fp32, with dsum.
constexpr size_t kMostBytesOfBwdRows = 4 * 96 * kBwdClusterThreads;

// build: the number of the build that was chosen.
void launch_layer_norm_fwd_sm90(const LayerNormFwd& op, int build, Stream stream);
void launch_layer_norm_bwd_sm90(const LayerNormBwd& op, int build, Stream stream);

// How many clusters share the rows; 0 where clusters do not take them. build: a number, or kRule.
int layer_norm_bwd_sm90_partials(int64_t rows, int cols, int device, int build);

}  // namespace gk
