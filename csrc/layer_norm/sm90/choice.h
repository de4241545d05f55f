// How LayerNorm's cluster kernels share out a row, for their launchers (compute capability 9.0).
//
// A build names a cluster and the most threads of each of its CTAs; the columns then say how
// many groups a thread holds, by the kernels that there are, and with that how many warps are
// needed.
#pragma once

#include <string>

#include "layer_norm/params.h"

namespace gk {

constexpr int kBwdClusterThreads = 256;  // of a CTA of the backward kernels, at most
// Columns past which the backward kernels for any device read dy and s twice.
constexpr int kMostColsOfBwdCta = 8192;

struct Split {
    int build;
    int ctas;    // of a cluster
    int warps;   // of a CTA, no more than hold some of the row
    int groups;  // of a thread; 0: clusters refuse the row
};

Split layer_norm_fwd_split(const LayerNormFwd& p, int build);
Split layer_norm_bwd_split(int cols, bool aligned_rows, int build);

// Of the two halves in which a backward cluster's sums meet.
constexpr size_t bwd_scratch_bytes(int ctas, int warps) {
    return 2 * sizeof(float2) * ctas * warps;
}
// Beside it, at most: of four groups a thread, fp32, with dsum.
constexpr size_t kMostBytesOfBwdRows = 4 * 96 * kBwdClusterThreads;

// Whether clusters take a problem that they refuse for this reason, "" where they do not refuse.
// Throws Error where a build was asked for and cannot run.
bool by_clusters(const char* op, const std::string& shape, int build, int device,
                 const std::string& refused);

}  // namespace gk
