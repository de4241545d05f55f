// Which clusters share a row of LayerNorm: the builds, the rule that chooses among them, and the
// rows that it leaves to the kernels for any GPU.
#include "layer_norm/sm90/choice.h"

namespace gk {
namespace {

// Forward: from this many columns on, a CTA of the kernel for any GPU is alone on its SM, so that
// memory is idle while the CTA adds up.
constexpr int kFewestFwdCols = 16384;
// Groups of a thread: the usual number where it is enough, and the number for rows that are not
// aligned.
constexpr int kUsualFwdGroups = 4, kUsualBwdGroups = 2, kUnalignedGroups = 2;

constexpr Build fwd(const char* name, int ctas, unsigned threads, Rule rule) {
    const int warps = ctas * static_cast<int>(threads) / 32;
    return {.name = name,
            .head_width = 0,
            .tile_m = 1,
            .tile_n = 32 * warps * kUsualFwdGroups * kGroup,
            .tile_k = 0,
            .stages = 1,
            .consumers = 0,
            .cluster = ctas,
            .pingpong = false,
            .threads = threads,
            .shared_bytes = warps * (sizeof(float) + sizeof(float2)),
            .rule = rule};
}

constexpr Build bwd(const char* name, int ctas, unsigned threads, Rule rule) {
    const int warps = static_cast<int>(threads) / 32;
    return {.name = name,
            .head_width = 0,
            .tile_m = 1,
            .tile_n = 32 * warps * ctas * 4 * kGroup,
            .tile_k = 0,
            .stages = 2,
            .consumers = 0,
            .cluster = ctas,
            .pingpong = false,
            .threads = threads,
            .shared_bytes = bwd_scratch_bytes(ctas, warps) + kMostBytesOfBwdRows,
            .rule = rule};
}

// The rule prefers the first build. Several smaller CTAs on an SM hide each other's barriers. Every
// build runs in every dtype, because the kernels are the same.
constexpr Build kFwdBuilds[] = {
    fwd("2 CTAs of 256 threads", 2, 256, Rule::always),
    fwd("4 CTAs of 256 threads", 4, 256, Rule::always),
    fwd("8 CTAs of 256 threads", 8, 256, Rule::always),
    fwd("8 CTAs of 512 threads", 8, 512, Rule::always),
    fwd("4 CTAs of 128 threads", 4, 128, Rule::never),
    fwd("8 CTAs of 128 threads", 8, 128, Rule::never),
    fwd("2 CTAs of 512 threads", 2, 512, Rule::never),
};
constexpr Build kBwdBuilds[] = {
    bwd("2 CTAs of 256 threads", 2, 256, Rule::never),
    bwd("4 CTAs of 256 threads", 4, 256, Rule::always),
    bwd("8 CTAs of 256 threads", 8, 256, Rule::always),
    bwd("4 CTAs of 128 threads", 4, 128, Rule::never),
    bwd("8 CTAs of 128 threads", 8, 128, Rule::never),
};

int lanes_of(const Build& build) { return build.cluster * static_cast<int>(build.threads) / 32; }

// groups: how many groups of a thread there are kernels for, in rising order.
ClusterRow row_of(int cols, const Build& build, std::initializer_list<int> groups) {
    const int lanes = lane_groups(cols);
    for (const int each : groups)
        if (lanes <= each * lanes_of(build))
            return {build.cluster, divide_up(lanes, each * build.cluster), each};
    return {build.cluster, 0, 0};
}

// The first of the rule's builds that holds a row in this many groups of a thread, or else its last
// build.
int preferred(std::span<const Build> builds, int cols, int groups) {
    int found = kAnyGpu;
    for (int i = 0; i < static_cast<int>(builds.size()); ++i) {
        if (builds[i].rule == Rule::never) continue;
        found = i;
        if (lane_groups(cols) <= groups * lanes_of(builds[i])) break;
    }
    return found;
}

// Returns why a build cannot hold a row, or "" if it can.
std::string too_wide(int cols, const Build& build, const ClusterRow& row) {
    if (row.groups > 0) return "";
    return "rows of " + std::to_string(cols) + " columns do not fit in the registers of " +
           std::to_string(build.cluster) + " CTAs of " + std::to_string(build.threads) +
           " threads";
}

auto fwd_refuses(const LayerNormFwd& op) {
    return [&op](int number) {
        return too_wide(op.cols, kFwdBuilds[number], layer_norm_fwd_row(op, number));
    };
}
auto bwd_refuses(int cols, bool aligned_rows) {
    return [=](int number) {
        return too_wide(cols, kBwdBuilds[number], layer_norm_bwd_row(cols, aligned_rows, number));
    };
}

// The choice of a build, unless the build is refused.
template <class Refuses>
Choice fitting(int number, Refuses&& refuses) {
    const std::string reason = refuses(number);
    return {reason.empty() ? number : kAnyGpu, reason};
}

Choice fwd_by_rule(const LayerNormFwd& op) {
    if (op.cols < kFewestFwdCols)
        return {kAnyGpu, "rows of fewer than " + std::to_string(kFewestFwdCols) +
                             " columns need no cluster"};
    const int groups = is_aligned(op) ? kUsualFwdGroups : kUnalignedGroups;
    return fitting(preferred(kFwdBuilds, op.cols, groups), fwd_refuses(op));
}

Choice bwd_by_rule(int cols, bool aligned_rows) {
    if (cols <= kMostColsOfBwdCta)
        return {kAnyGpu, "rows of up to " + std::to_string(kMostColsOfBwdCta) +
                             " columns need no cluster"};
    return fitting(preferred(kBwdBuilds, cols, kUsualBwdGroups), bwd_refuses(cols, aligned_rows));
}

}  // namespace

std::vector<Build> layer_norm_fwd_builds() {
    return {std::begin(kFwdBuilds), std::end(kFwdBuilds)};
}
std::vector<Build> layer_norm_bwd_builds() {
    return {std::begin(kBwdBuilds), std::end(kBwdBuilds)};
}

ClusterRow layer_norm_fwd_row(const LayerNormFwd& op, int build) {
    if (!is_aligned(op)) return row_of(op.cols, kFwdBuilds[build], {kUnalignedGroups});
    if (op.sum_dtype == DType::f32)
        return row_of(op.cols, kFwdBuilds[build], {2, kUsualFwdGroups});
    return row_of(op.cols, kFwdBuilds[build], {2, kUsualFwdGroups, 8});
}

ClusterRow layer_norm_bwd_row(int cols, bool aligned_rows, int build) {
    if (!aligned_rows) return row_of(cols, kBwdBuilds[build], {kUnalignedGroups});
    return row_of(cols, kBwdBuilds[build], {kUsualBwdGroups, 4});
}

Choice choose_layer_norm_fwd(const LayerNormFwd& op, int build, int device) {
    return choose(
        kLayerNormFwdSm90, kFwdBuilds, op, build, device, [] { return std::string(); },
        fwd_refuses(op), [&] { return fwd_by_rule(op); });
}

Choice choose_layer_norm_bwd(const LayerNormBwd& op, int build, int device) {
    const bool aligned_rows = is_aligned(op);
    return choose(
        kLayerNormBwdSm90, kBwdBuilds, op, build, device, [] { return std::string(); },
        bwd_refuses(op.cols, aligned_rows), [&] { return bwd_by_rule(op.cols, aligned_rows); });
}

int layer_norm_bwd_sm90_build(int cols, bool aligned_rows, int build) {
    if (build < 0) return bwd_by_rule(cols, aligned_rows).build;
    if (build >= static_cast<int>(std::size(kBwdBuilds))) return kAnyGpu;
    return fitting(build, bwd_refuses(cols, aligned_rows)).build;
}

}  // namespace gk
