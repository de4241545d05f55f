// Which kernel makes each of the MLP's products, in how large tiles, and in how many parts of k.
#include "gelu_mlp/sm90/tiles.h"

#include <algorithm>
#include <limits>

#include "runtime/launch.h"
#include "runtime/dry_run.h"

namespace gk {
namespace {

template <class C>
constexpr Build described(const char* name) {
    return {name,       0,           C::kM,        C::kN,       C::kK,         C::kStages,
            C::kConsumers, C::kCluster, C::kPingpong, C::kThreads, C::kSharedBytes};
}

// ---- predictions, in clocks of a multiprocessor. Not measured: rates are the data sheet's and what
// others have measured; they only have to put the choices in the right order.

constexpr double kProducts = 2048.0;      // multiply-adds a clock, of 16 bits
constexpr double kFromL2 = 5300.0;        // bytes a clock, all of the chip
constexpr double kIntoOne = 64.0;         // bytes a clock into a multiprocessor
constexpr double kFromMemory = 2400.0;    // bytes a clock, all of the chip
constexpr double kLaunch = 6000.0;        // of another kernel
constexpr double kStart = 2500.0;         // until the first products, and after the last
// Of a warpgroup that turns 64 x 64 results into outputs: rounds; applies GELU; its slope too. That
// is 50 to 200, 500 and 730 instructions of each of four warps, and what they wait for.
constexpr double kRound = 300.0, kActivate = 800.0, kDifferentiate = 1000.0;
// What of kProducts mma.sync reaches in tiles of 128 x 128 and 64 x 64, in as many CTAs as fit; what
// of a warpgroup's time the outputs of 64 x 64 results take there, where CTAs hide each other's.
constexpr double kGenericLarge = 0.5, kGenericSmall = 0.3, kGenericFinish = 0.6;
// In doubt Hopper's: the other is chosen where it is predicted to take less than this of its time.
constexpr double kGenericGain = 0.75;

struct Choice {
    double clocks;
    int build, splits;
};

double waves(int64_t items, int64_t places) { return static_cast<double>(ceil_div(items, places)); }

double unit_clocks(const Product& p) {
    return p.h != nullptr ? kDifferentiate : p.activation != nullptr ? kActivate : kRound;
}

double clocks_of(const Build& c, Layout layout, const Product& p, int splits, int processors) {
    const int64_t places = std::max(1, processors / c.cluster);
    const int64_t items =
        ceil_div(p.m, int64_t{c.tile_m} * c.cluster) * ceil_div(p.n, c.tile_n) * splits;
    const double bytes = 2.0 * c.tile_k * (c.tile_m + static_cast<double>(c.tile_n) / c.cluster);
    const double loading = static_cast<double>(std::min(items, places) * c.cluster);
    const double step = std::max(static_cast<double>(c.tile_m) * c.tile_n * c.tile_k / kProducts,
                                 bytes / std::min(kIntoOne, kFromL2 / loading));
    const double products = step * static_cast<double>(ceil_div(ceil_div(p.k, c.tile_k), splits));
    const double finish = unit_clocks(p) * (splits > 1 ? 2.0 : 1.0) * c.tile_m * c.tile_n / (64.0 * 64.0) /
                          (c.pingpong ? 1 : c.consumers);
    double total = kStart + finish;
    if (c.pingpong) {
        total += waves(items, places) * std::max(products, (products + finish) / c.consumers);
    } else {
        total += waves(items, places) * (products + finish) - finish;
    }
    if (layout == Layout::weight && splits > 1) {
        const double partial = 4.0 * static_cast<double>(p.m) * static_cast<double>(p.n) * splits;
        total += kLaunch + 2.0 * partial / kFromMemory;
    }
    return total;
}

double generic_clocks(const Product& p, int processors) {
    const auto of = [&](int size, int resident, double rate) {
        const int64_t tiles = ceil_div(p.m, size) * ceil_div(p.n, size);
        const double products = size * size * static_cast<double>(p.k) / (kProducts * rate);
        const double finish = kGenericFinish * unit_clocks(p) * size * size / (64.0 * 64.0);
        return kStart + waves(tiles, int64_t{processors} * resident) * resident *
                            (products + finish);
    };
    return std::min(of(128, 2, kGenericLarge), of(64, 3, kGenericSmall));
}

}  // namespace

Build product_build(int number) {
    switch (number) {
        case 0: return described<ProductBuild<0>>("128x256, cooperative, cluster of 2");
        case 1: return described<ProductBuild<1>>("128x192, ping-pong, cluster of 2");
        case 2: return described<ProductBuild<2>>("128x128, cooperative");
        case 3: return described<ProductBuild<3>>("128x256, cooperative");
        case 4: return described<ProductBuild<4>>("128x192, cooperative, cluster of 2");
        case 5: return described<ProductBuild<5>>("256x128, cooperative, cluster of 2");
        default: return described<ProductBuild<6>>("64x256, ping-pong");
    }
}

std::vector<Build> gelu_mlp_builds() {
    std::vector<Build> all;
    for (int i = 0; i < kProductBuilds; ++i) all.push_back(product_build(i));
    return all;
}

std::string gelu_mlp_sm90_refuses(DType dtype, Layout layout, const Product& p) {
    if (dtype == DType::f32) return "wgmma has no products in full precision";
    if (p.n % 8 != 0) return "rows of the result are no multiple of 16 bytes";
    // It is read in pairs.
    if (reinterpret_cast<uintptr_t>(p.bias) % 4 != 0) return "bias: not at a multiple of 4 bytes";
    // Coordinates have 32 bits, and a last tile reaches past the end.
    constexpr int64_t kLongest = std::numeric_limits<int>::max() - 1024;
    if (std::max({p.m, p.n, p.k}) > kLongest) return "a dimension is too long for TMA";
    struct Named {
        const char* name;
        const void* base;
        int64_t rows, cols, stride;
    };
    const bool trans_a = layout == Layout::weight, trans_b = layout != Layout::forward;
    const Named matrices[] = {
        {"a", p.a, trans_a ? p.k : p.m, trans_a ? p.m : p.k, p.a_stride},
        {"b", p.b, trans_b ? p.k : p.n, trans_b ? p.n : p.k, p.b_stride},
        {"h", p.h, p.m, p.n, p.n},
        {"out", p.out, p.m, p.n, p.n},
        {"activation", p.activation, p.m, p.n, p.n},
    };
    for (const Named& x : matrices) {
        if (x.base == nullptr) continue;
        const char* reason = tensor_map_refuses(
            {dtype, 2, x.base, {x.cols, x.rows}, {1, x.stride}, {64, 64}, Swizzle::b128});
        if (reason != nullptr) return std::string(x.name) + ": " + reason;
    }
    return "";
}

namespace {

// Throws Error where there is no such build for the dtype, or where p is refused for a reason.
void check_build(int build, DType dtype, const Product& p, const std::string& refusal) {
    std::string reason = refusal;
    if (build >= kProductBuilds) {
        reason = "there are " + std::to_string(kProductBuilds) + " of them";
    } else if (reason.empty() && build >= kProductRule && dtype != DType::bf16) {
        reason = "it is there for bf16 alone";
    }
    if (reason.empty()) return;
    throw Error("build " + std::to_string(build) + " cannot make the mlp product of " +
                shape_of(p.m, p.k) + " and " + shape_of(p.k, p.n) + " " + name_of(dtype) + ": " +
                reason);
}

// The rule's choice, whose build is -1 where the kernel for any device is predicted to be faster;
// or the plan of a build. p is not refused.
ProductChoice choose_product_sm90(Layout layout, const Product& p, int build, int device) {
    constexpr int kMostSplits = 8, kLeastSteps = 4;  // each part of k fills the stages
    const int processors = multiprocessors(device);
    const int64_t steps = ceil_div(p.k, kProductStep);
    const int most = layout == Layout::weight
                         ? static_cast<int>(std::clamp<int64_t>(steps / kLeastSteps, 1, kMostSplits))
                         : 1;
    constexpr double kNever = std::numeric_limits<double>::infinity();
    Choice best{build >= 0 ? kNever : generic_clocks(p, processors) / kGenericGain, -1, 1};
    for (int i = 0; i < kProductBuilds; ++i) {
        if (build >= 0 ? i != build : i >= kProductRule) continue;
        for (int splits = 1; splits <= most; ++splits) {
            const double clocks = clocks_of(product_build(i), layout, p, splits, processors);
            if (clocks < best.clocks) best = {clocks, i, splits};
        }
    }
    return {best.build, kUnitRows, best.splits};
}

// Why no kernel for Hopper can make the product, or "".
std::string refusal(DType dtype, Layout layout, const Product& p, int device) {
    if (capability(device) != 90) return "it is for compute capability 9.0 alone";
    return gelu_mlp_sm90_refuses(dtype, layout, p);
}

}  // namespace

ProductChoice choose_product(DType dtype, Layout layout, const Product& p, int build, int device) {
    if (build >= 0) {
        check_build(build, dtype, p, refusal(dtype, layout, p, device));
        return choose_product_sm90(layout, p, build, device);
    }
    if (refusal(dtype, layout, p, device).empty()) {
        const ProductChoice plan = choose_product_sm90(layout, p, build, device);
        if (plan.build >= 0) return plan;
    }
    return choose_product_any(layout, p.m, p.n, p.k, device);
}

int64_t product_partials(DType dtype, Layout layout, const Product& p, int build, Stream stream) {
    const ProductChoice plan = choose_product(dtype, layout, p, build, stream.device);
    return layout == Layout::weight ? plan.splits : ceil_div(p.m, plan.tile_rows);
}

void launch_product(DType dtype, Layout layout, const Product& p, int build, Stream stream) {
    const ProductChoice plan = choose_product(dtype, layout, p, build, stream.device);
    if (plan.build >= 0) {
        if (p.splits > ceil_div(p.k, kProductStep)) {
            throw Error("the mlp product of " + shape_of(p.m, p.k) + " and " + shape_of(p.k, p.n) +
                        " has fewer steps along k than parts, " + std::to_string(p.splits));
        }
        switch (layout) {
            case Layout::forward: return launch_forward_sm90(plan.build, dtype, p, stream);
            case Layout::backward: return launch_backward_sm90(plan.build, dtype, p, stream);
            case Layout::weight: return launch_weight_sm90(plan.build, dtype, p, stream);
        }
    }
    if (DryRun::current() != nullptr && capability(stream.device) == 90) {
        const std::string reason = gelu_mlp_sm90_refuses(dtype, layout, p);
        dry_run_refused("mlp product for sm90",
                     reason.empty() ? "it is predicted to be slower" : reason);
    }
    launch_product_any(dtype, layout, p, plan.tile_rows, stream);
}

}  // namespace gk
