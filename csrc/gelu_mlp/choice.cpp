// Which kernel computes each of the MLP's products, with which tiles, and with how many splits of
// k.
#include "gelu_mlp/choice.h"

#include <algorithm>
#include <limits>
#include <span>

#include "gelu_mlp/sm90/tiles.h"
#include "runtime/dry_run.h"

namespace gk {
namespace {

// ---- Predictions, in clocks of a multiprocessor. The choice is made by them, and `python -m
// gptkernels.bench.predict` shows them. Nothing here is measured on our kernels. The rates are
// those of the data sheet and of other people's measurements, and they only have to rank the
// choices correctly.

constexpr double kProducts = 2048.0;      // multiply-adds a clock, of 16 bits
constexpr double kFromL2 = 5300.0;        // bytes a clock, all of the chip
constexpr double kIntoOne = 64.0;         // bytes a clock into a multiprocessor
constexpr double kFromMemory = 2400.0;    // bytes a clock, all of the chip
constexpr double kLaunch = 6000.0;        // to launch another kernel
constexpr double kStart = 2500.0;         // before the first products and after the last
// The time that a warpgroup takes to turn 64 x 64 results into outputs by rounding, with GELU, and
// with the slope of GELU: 50 to 200, 500 and 730 instructions of each of its four warps, and their
// waits.
constexpr double kRound = 300.0, kActivate = 800.0, kDifferentiate = 1000.0;
// The kernel for any GPU: the share of kProducts that mma.sync reaches in tiles of 128 x 128 and of
// 64 x 64, and the share of the times above that remains where CTAs hide each other's outputs.
constexpr double kGenericLarge = 0.5, kGenericSmall = 0.3, kGenericFinish = 0.6;
// The kernel for any GPU is chosen only where its predicted time is less than this share of the
// time of the kernel for Hopper.
constexpr double kGenericGain = 0.75;

constexpr const char* kName = "gelu_mlp product for sm90";

double waves(int64_t items, int64_t places) {
    return static_cast<double>(divide_up(items, places));
}

double unit_clocks_of(const Product& p) {
    return p.h != nullptr ? kDifferentiate : p.activation != nullptr ? kActivate : kRound;
}

double clocks_of(const Build& c, Layout layout, const Product& p, double unit_clocks, int splits,
                 int processors) {
    const int64_t places = std::max(1, processors / c.cluster);
    const int64_t items =
        divide_up(p.m, int64_t{c.tile_m} * c.cluster) * divide_up(p.n, c.tile_n) * splits;
    const double bytes = 2.0 * c.tile_k * (c.tile_m + static_cast<double>(c.tile_n) / c.cluster);
    const double loading = static_cast<double>(std::min(items, places) * c.cluster);
    const double step = std::max(static_cast<double>(c.tile_m) * c.tile_n * c.tile_k / kProducts,
                                 bytes / std::min(kIntoOne, kFromL2 / loading));
    const double products = step * static_cast<double>(divide_up(divide_up(p.k, c.tile_k), splits));
    const double finish = unit_clocks * (splits > 1 ? 2.0 : 1.0) * c.tile_m * c.tile_n /
                          (64.0 * 64.0) / (c.pingpong ? 1 : c.consumers);
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

double generic_clocks(const Product& p, double unit_clocks, int processors) {
    const auto of = [&](int size, int resident, double rate) {
        const int64_t tiles = divide_up(p.m, size) * divide_up(p.n, size);
        const double products = size * size * static_cast<double>(p.k) / (kProducts * rate);
        const double finish = kGenericFinish * unit_clocks * size * size / (64.0 * 64.0);
        return kStart + waves(tiles, int64_t{processors} * resident) * resident *
                            (products + finish);
    };
    return std::min(of(128, 2, kGenericLarge), of(64, 3, kGenericSmall));
}

struct Matrix {
    const char* name;
    const void* base;
    int64_t rows, cols, stride;
};

// Returns why TMA cannot address one of the matrices that are there, or "" if it can.
std::string matrices_refuse(DType dtype, std::span<const Matrix> matrices) {
    for (const Matrix& x : matrices) {
        if (x.base == nullptr) continue;
        const char* reason = tensor_map_refuses(
            {dtype, 2, x.base, {x.cols, x.rows}, {1, x.stride}, {64, 64}, Swizzle::b128});
        if (reason != nullptr) return std::string(x.name) + ": " + reason;
    }
    return "";
}

// Returns why no build can compute the product, or "" if one can.
std::string refuses(DType dtype, Layout layout, const Product& p) {
    const std::string reason = operands_refuse(dtype, layout, p);
    if (!reason.empty()) return reason;
    if (p.n % 8 != 0) return "rows of the result are no multiple of 16 bytes";
    // The kernel reads the bias two elements at a time.
    if (reinterpret_cast<uintptr_t>(p.bias) % 4 != 0) return "bias: not at a multiple of 4 bytes";
    const Matrix matrices[] = {
        {"h", p.h, p.m, p.n, p.n},
        {"out", p.out, p.m, p.n, p.n},
        {"activation", p.activation, p.m, p.n, p.n},
        {"addend", p.addend, p.m, p.n, p.n},
        {"total", p.total, p.m, p.n, p.n},
    };
    return matrices_refuse(dtype, matrices);
}

// A number of splits of k, and how long the product is predicted to take with it.
struct Split {
    int parts;
    double clocks;
};

// The number of splits with the shortest predicted time.
Split split_of(const Build& build, Layout layout, const Product& p, double unit_clocks,
               int processors) {
    constexpr int kMostSplits = 8, kLeastSteps = 4;  // a split has enough steps to fill the stages
    const int64_t steps = divide_up(p.k, kProductStep);
    const int64_t most =
        layout == Layout::weight ? std::clamp<int64_t>(steps / kLeastSteps, 1, kMostSplits) : 1;
    Split best{1, clocks_of(build, layout, p, unit_clocks, 1, processors)};
    for (int parts = 2; parts <= most; ++parts) {
        const double clocks = clocks_of(build, layout, p, unit_clocks, parts, processors);
        if (clocks < best.clocks) best = {parts, clocks};
    }
    return best;
}

Choice choose_build(DType dtype, Layout layout, const Product& p, int build, int device) {
    return choose(
        kName, kProductBuilds, p, build, device, [&] { return refuses(dtype, layout, p); },
        [&](int number) { return build_refuses(kProductBuilds[number], dtype); },
        [&] {
            return product_by_rule(layout, p, unit_clocks_of(p), multiprocessors(device));
        });
}

}  // namespace

const double kExponentialUnit = kActivate;

std::string operands_refuse(DType dtype, Layout layout, const Product& p) {
    if (dtype == DType::f32) return "wgmma has no products in full precision";
    // Coordinates have 32 bits, and the last tile may reach past the end.
    constexpr int64_t kLongest = std::numeric_limits<int>::max() - 1024;
    if (std::max({p.m, p.n, p.k}) > kLongest) return "a dimension is too long for TMA";
    const bool trans_a = layout == Layout::weight, trans_b = layout != Layout::forward;
    const Matrix matrices[] = {
        {"a", p.a, trans_a ? p.k : p.m, trans_a ? p.m : p.k, p.a_stride},
        {"b", p.b, trans_b ? p.k : p.n, trans_b ? p.n : p.k, p.b_stride},
    };
    return matrices_refuse(dtype, matrices);
}

Choice product_by_rule(Layout layout, const Product& p, double unit_clocks, int processors) {
    Choice best{kAnyGpu, "it is predicted to be slower"};
    double least = generic_clocks(p, unit_clocks, processors) / kGenericGain;
    for (int i = 0; i < kProductCount; ++i) {
        if (kProductBuilds[i].rule == Rule::never) continue;
        const double clocks =
            split_of(kProductBuilds[i], layout, p, unit_clocks, processors).clocks;
        if (clocks >= least) continue;
        least = clocks;
        best = {i};
    }
    return best;
}

ProductChoice product_choice(Layout layout, const Product& p, double unit_clocks, int build,
                             int device) {
    const int processors = multiprocessors(device);
    if (build != kAnyGpu) {
        const Split split = split_of(kProductBuilds[build], layout, p, unit_clocks, processors);
        return {build, kUnitRows, split.parts, split.clocks};
    }
    ProductChoice choice = choose_product_any(layout, p.m, p.n, p.k, device);
    if (capability(device) == 90) choice.clocks = generic_clocks(p, unit_clocks, processors);
    return choice;
}

std::vector<Build> gelu_mlp_builds() { return {kProductBuilds.begin(), kProductBuilds.end()}; }

ProductChoice choose_product(DType dtype, Layout layout, const Product& p, int build, int device) {
    const Choice choice = choose_build(dtype, layout, p, build, device);
    return product_choice(layout, p, unit_clocks_of(p), choice.build, device);
}

int64_t product_partials(DType dtype, Layout layout, const Product& p, int build, Stream stream) {
    const ProductChoice choice = choose_product(dtype, layout, p, build, stream.device);
    return layout == Layout::weight ? choice.splits : divide_up(p.m, choice.tile_rows);
}

void launch_product(DType dtype, Layout layout, const Product& p, int build, Stream stream) {
    const Choice chosen = choose_build(dtype, layout, p, build, stream.device);
    const ProductChoice choice =
        product_choice(layout, p, unit_clocks_of(p), chosen.build, stream.device);
    dry_run_refused(kName, chosen.reason);
    if (choice.build == kAnyGpu) return launch_product_any(dtype, layout, p, choice, stream);
    if (p.splits > divide_up(p.k, kProductStep)) {
        throw Error("the gelu_mlp product of " + shape_of(p) +
                    " has fewer steps along k than splits, " + std::to_string(p.splits));
    }
    switch (layout) {
        case Layout::forward: return launch_product_sm90<Layout::forward>(dtype, p, choice, stream);
        case Layout::backward:
            return launch_product_sm90<Layout::backward>(dtype, p, choice, stream);
        case Layout::weight: return launch_product_sm90<Layout::weight>(dtype, p, choice, stream);
    }
}

}  // namespace gk
