// Which clusters share a row of LayerNorm: the builds, the rule that chooses among them, and
// what it leaves to the kernels for any device.
#include "layer_norm/sm90/choice.h"

#include "layer_norm/shape.h"
#include "runtime/dry_run.h"

namespace gk {
namespace {

// Forward: columns from which a CTA of the kernel for any device is alone on its SM, so that memory
// is idle while it adds up.
constexpr int kFewestFwdCols = 16384;
constexpr int kUsualFwdGroups = 4;  // of a thread, where that is enough

// In the order of preference; the first that holds the row in the usual number of groups is the
// rule's choice. Several smaller CTAs on an SM hide each other's barriers.
const std::vector<int> kFwdPreferred = {0, 1, 2, 3};
const std::vector<int> kBwdPreferred = {1, 2};
constexpr int kUsualBwdGroups = 2;
constexpr int kUnalignedGroups = 2;  // where rows are not aligned

int lanes_of(const Build& by) { return by.cluster * static_cast<int>(by.threads) / 32; }

// groups: of a thread, that there are kernels for, rising.
Split split_of(int cols, const std::vector<Build>& builds, int index,
               const std::vector<int>& groups) {
    const Build& by = builds[index];
    const int lanes = lane_groups(cols);
    for (const int each : groups)
        if (lanes <= each * lanes_of(by))
            return {index, by.cluster, divide_up(lanes, each * by.cluster), each};
    return {index, by.cluster, 0, 0};
}

int chosen(int cols, const std::vector<Build>& builds, const std::vector<int>& preferred,
           int groups) {
    for (const int index : preferred)
        if (lane_groups(cols) <= groups * lanes_of(builds[index])) return index;
    return preferred.back();
}

Build fwd(const char* name, int ctas, unsigned threads) {
    const size_t warps = ctas * threads / 32;
    const int cols = ctas * static_cast<int>(threads) * kUsualFwdGroups * kGroup;
    return {name, 0,    1,     cols,    0, 1,
            0,    ctas, false, threads, warps * (sizeof(float) + sizeof(float2))};
}

Build bwd(const char* name, int ctas, unsigned threads) {
    const int cols = ctas * static_cast<int>(threads) * 4 * kGroup;
    const int warps = static_cast<int>(threads) / 32;
    return {name, 0,    1,     cols,    0, 2,
            0,    ctas, false, threads, bwd_scratch_bytes(ctas, warps) + kMostBytesOfBwdRows};
}

std::string unknown(int build, size_t builds) {
    if (build < static_cast<int>(builds)) return "";
    return "there are " + std::to_string(builds) + " builds";
}

std::string too_wide(int cols, const Build& by) {
    return "rows of " + std::to_string(cols) + " columns do not fit in the registers of " +
           std::to_string(by.cluster) + " CTAs of " + std::to_string(by.threads) + " threads";
}

}  // namespace

std::vector<Build> layer_norm_fwd_builds() {
    return {fwd("2 CTAs of 256 threads", 2, 256), fwd("4 CTAs of 256 threads", 4, 256),
            fwd("8 CTAs of 256 threads", 8, 256), fwd("8 CTAs of 512 threads", 8, 512),
            fwd("4 CTAs of 128 threads", 4, 128), fwd("8 CTAs of 128 threads", 8, 128),
            fwd("2 CTAs of 512 threads", 2, 512)};
}

std::vector<Build> layer_norm_bwd_builds() {
    return {bwd("2 CTAs of 256 threads", 2, 256), bwd("4 CTAs of 256 threads", 4, 256),
            bwd("8 CTAs of 256 threads", 8, 256), bwd("4 CTAs of 128 threads", 4, 128),
            bwd("8 CTAs of 128 threads", 8, 128)};
}

Split layer_norm_fwd_split(const LayerNormFwd& op, int build) {
    const std::vector<Build> builds = layer_norm_fwd_builds();
    if (build < 0 && op.cols < kFewestFwdCols) return {};
    const bool aligned_rows = is_aligned(op);
    if (build < 0)
        build = chosen(op.cols, builds, kFwdPreferred,
                           aligned_rows ? kUsualFwdGroups : kUnalignedGroups);
    if (!aligned_rows) return split_of(op.cols, builds, build, {kUnalignedGroups});
    if (op.sum_dtype == DType::f32)
        return split_of(op.cols, builds, build, {2, kUsualFwdGroups});
    return split_of(op.cols, builds, build, {2, kUsualFwdGroups, 8});
}

Split layer_norm_bwd_split(int cols, bool aligned_rows, int build) {
    const std::vector<Build> builds = layer_norm_bwd_builds();
    if (build >= static_cast<int>(builds.size())) return {};
    if (build < 0 && cols <= kMostColsOfBwdCta) return {};
    if (build < 0) build = chosen(cols, builds, kBwdPreferred, kUsualBwdGroups);
    if (!aligned_rows) return split_of(cols, builds, build, {kUnalignedGroups});
    return split_of(cols, builds, build, {kUsualBwdGroups, 4});
}

std::string layer_norm_fwd_sm90_refuses(const LayerNormFwd& op, int build) {
    const std::vector<Build> builds = layer_norm_fwd_builds();
    const std::string reason = unknown(build, builds.size());
    if (!reason.empty()) return reason;
    if (build < 0 && op.cols < kFewestFwdCols)
        return "rows of fewer than " + std::to_string(kFewestFwdCols) + " columns need no cluster";
    const Split split = layer_norm_fwd_split(op, build);
    return split.groups > 0 ? "" : too_wide(op.cols, builds[split.build]);
}

std::string layer_norm_bwd_sm90_refuses(const LayerNormBwd& op, int build) {
    const std::vector<Build> builds = layer_norm_bwd_builds();
    const std::string reason = unknown(build, builds.size());
    if (!reason.empty()) return reason;
    if (build < 0 && op.cols <= kMostColsOfBwdCta)
        return "rows of up to " + std::to_string(kMostColsOfBwdCta) + " columns need no cluster";
    const Split split = layer_norm_bwd_split(op.cols, is_aligned(op), build);
    return split.groups > 0 ? "" : too_wide(op.cols, builds[split.build]);
}

bool by_clusters(const char* op, const std::string& shape, int build, int device,
                 const std::string& refused) {
    const bool hopper = capability(device) == 90;
    if (hopper && refused.empty()) return true;
    if (build >= 0)
        throw Error(std::string(op) + " on " + shape + ": build " + std::to_string(build) +
                    " cannot run: " +
                    (hopper ? refused : "clusters need a GPU of compute capability 9.0"));
    if (hopper) dry_run_refused((std::string(op) + "_sm90").c_str(), refused);
    return false;
}

}  // namespace gk
