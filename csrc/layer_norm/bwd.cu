// LayerNorm backward; formulas, shapes and bytes are in layer_norm/params.h.
//
// Up to 8,192 columns the CTAs are persistent (layer_norm/bwd_row.h). A CTA has up to eight warps:
// eight rows of one warp each, four rows of two warps, and so on. A second, small kernel adds the
// CTAs' shares of dweight and dbias in a fixed order: no atomics, the same bits every time.
//
// Wider rows do not fit in registers beside their sums. There one kernel computes the gradients of
// the rows, and another reads dy and s again to compute the shares of dweight and dbias by columns.
// A row stays in registers between its two passes up to 16,384 columns, or 20,480 where x and s
// have 16 bits; a wider row is read twice, the second time from L2.
#include <algorithm>

#include "layer_norm/bwd_row.h"
#include "layer_norm/sm90/choice.h"
#include "runtime/dry_run.h"

namespace gk {
namespace {

constexpr int kMostGroups = 4;  // of a thread
constexpr int kMostWarps = 8;

// The warps of a CTA of the persistent kernel, and how many CTAs its registers allow on an SM:
// while one CTA waits at a barrier, the others work.
constexpr int cta_warps(int groups, bool aligned_rows) {
    return groups == kMostGroups || (groups == 2 && aligned_rows) ? kMostWarps : 4;
}
constexpr int ctas_of_sm(int groups, bool aligned_rows) {
    return groups == kMostGroups ? 1 : groups == 1 ? 5 : groups == 2 && aligned_rows ? 2 : 3;
}
constexpr size_t kScratchBytes = 2 * kMostWarps * sizeof(float2);

constexpr int kWideWarps = 16;    // of a CTA whose row is too wide for its sums to fit beside it
constexpr int kChunk = 2;         // groups of a thread, for a row too wide for registers
constexpr int kWeightsWarps = 8;  // of a CTA that sums a block of columns of such rows
constexpr int kReduceWarps = 32;  // at most, of a CTA that adds up 32 columns of the shares

// Sums over a team, in a CTA of one or several teams.
struct TeamTotal {
    int warps;        // warps of a team
    float2* scratch;  // 2 x kMostWarps, used in turns

    __device__ __forceinline__ float2 operator()(float2 sums, int turn) const {
        return team_sum(sums, warps, scratch + turn * kMostWarps);
    }
};

template <int kGroups, bool kAligned>
constexpr int kThreads = 32 * cta_warps(kGroups, kAligned);

template <class X, class S, int kGroups, bool kAligned>
__global__ void __launch_bounds__(kThreads<kGroups, kAligned>, ctas_of_sm(kGroups, kAligned))
    layer_norm_bwd_kernel(const __grid_constant__ Bwd p) {
    const Team team(p.warps);
    const int teams = blockDim.x / team.threads;
    const int64_t first = blockIdx.x;
    const Rows rows{first * teams, static_cast<int64_t>(gridDim.x) * teams, teams,
                    static_cast<int>(blockIdx.x)};
    float2* scratch = reinterpret_cast<float2*>(shared_memory());
    gradients_of_rows<X, S, kGroups, kAligned, kThreads<kGroups, kAligned>>(
        p, team, rows, shared_memory() + kScratchBytes, TeamTotal{p.warps, scratch});
}

// Each CTA computes the gradients of one row: in registers, or in chunks that are read twice.
template <class X, class S, int kGroups, bool kAligned, bool kChunks>
__global__ void __launch_bounds__(32 * kWideWarps)
    layer_norm_bwd_wide_kernel(const __grid_constant__ Bwd p) {
    // dsum is loaded with the row's other tensors if there are registers for it until the second
    // pass.
    constexpr bool kDsumEarly = !kChunks && kGroups * sizeof(S) <= 8;
    const LayerNormBwd& op = p.op;
    BwdPart<X, S, kGroups, kAligned, Weight::global, 32 * kWideWarps> part{op, Team(p.warps)};
    part.start(nullptr);
    part.take(blockIdx.x, part.statistics_of(blockIdx.x));
    const auto nothing = [](int, auto&, auto&) {};
    Pack<S, kGroup> dsum[kDsumEarly ? kGroups : 1];
    float2 sums = make_float2(0.0f, 0.0f);
    int first = 0;
    do {
        part.load(first);
        if constexpr (kDsumEarly) {
            if (op.dsum != nullptr) {
#pragma unroll
                for (int g = 0; g < kGroups; ++g) dsum[g] = part.load_dsum(first + g);
            }
        }
        const float2 more = part.sums(first, nothing);
        sums = make_float2(sums.x + more.x, sums.y + more.y);
        first += kGroups;
    } while (kChunks && part.team.col(first) < op.cols);
    sums = team_sum(sums, p.warps, reinterpret_cast<float2*>(shared_memory()));
    const float2 means = make_float2(divide(sums.x, p.cols), divide(sums.y, p.cols));
    first = 0;
    do {
        if (kChunks)
            part.load(first);
        else
            part.forget_values();
        part.store(first, means, [&](int group) {
            if constexpr (kDsumEarly)
                return dsum[group];
            else
                return part.load_dsum(first + group);
        });
        first += kGroups;
    } while (kChunks && part.team.col(first) < op.cols);
}

// The shares of dweight and dbias where rows are wide: CTA (share, block of columns) adds up every
// partials-th row, and each of its threads takes eight columns.
template <class X, class S, bool kAligned>
__global__ void __launch_bounds__(32 * kWeightsWarps)
    layer_norm_bwd_weights_kernel(const __grid_constant__ Bwd p) {
    const LayerNormBwd& op = p.op;
    const int share = blockIdx.x % op.partials, block = blockIdx.x / op.partials;
    const int col = (block * blockDim.x + threadIdx.x) * kGroup;
    WeightGradients<1> gradients;
#pragma unroll 4
    for (int64_t row = share; row < op.rows; row += op.partials) {
        const auto dy = load_group<kAligned>(static_cast<const X*>(op.dy) + row * op.cols, col,
                                             op.cols);
        const auto s = load_group<kAligned>(static_cast<const S*>(op.sum) + row * op.sum_stride,
                                            col, op.cols);
        const float mean = op.mean[row], rstd = op.rstd[row];
        float gradient[kGroup], normalised[kGroup];
        unpack_floats(gradient, dy);
        unpack_floats(normalised, s);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) normalised[j] = (normalised[j] - mean) * rstd;
        gradients.add(0, gradient, normalised);
    }
    const int64_t start = static_cast<int64_t>(share) * op.cols;
    if (op.partial_dweight != nullptr)
        store_group<kAligned>(op.partial_dweight + start, col, op.cols,
                              pack_floats<float>(gradients.weight[0]));
    if (op.partial_dbias != nullptr)
        store_group<kAligned>(op.partial_dbias + start, col, op.cols,
                              pack_floats<float>(gradients.bias[0]));
}

struct Reduce {
    const float* shares[2];  // (partials, cols) each, or null
    void* totals[2];         // (cols,), dtype
    int partials, cols;
    DType dtype;
};

// Each lane takes a column. Every warp adds up some of the shares, and then warp 0 adds the warps'
// sums.
__global__ void __launch_bounds__(32 * kReduceWarps)
    layer_norm_bwd_reduce_kernel(const __grid_constant__ Reduce p) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int col = blockIdx.x * 32 + lane;
    float2 sums = make_float2(0.0f, 0.0f);
    if (col < p.cols) {
#pragma unroll 4
        for (int share = warp; share < p.partials; share += warps) {
            const int64_t at = static_cast<int64_t>(share) * p.cols + col;
            if (p.shares[0] != nullptr) sums.x += p.shares[0][at];
            if (p.shares[1] != nullptr) sums.y += p.shares[1][at];
        }
    }
    float2* shared = reinterpret_cast<float2*>(shared_memory());  // (warps, 32)
    shared[threadIdx.x] = sums;
    __syncthreads();
    if (warp != 0 || col >= p.cols) return;
    for (int other = 1; other < warps; ++other) {
        const float2 more = shared[other * 32 + lane];
        sums = make_float2(sums.x + more.x, sums.y + more.y);
    }
    if (p.totals[0] != nullptr) store_float(p.totals[0], p.dtype, col, sums.x);
    if (p.totals[1] != nullptr) store_float(p.totals[1], p.dtype, col, sums.y);
}

using Kernel = void (*)(Bwd);

template <class X, class S>
Kernel kernel_of(int groups, bool aligned_rows) {
    if (!aligned_rows) return layer_norm_bwd_kernel<X, S, 2, false>;
    switch (groups) {
        case 1: return layer_norm_bwd_kernel<X, S, 1, true>;
        case 2: return layer_norm_bwd_kernel<X, S, 2, true>;
        case 3: return layer_norm_bwd_kernel<X, S, 3, true>;
    }
    return layer_norm_bwd_kernel<X, S, kMostGroups, true>;
}

// The kernel for a row of this many groups a thread, if one CTA holds the whole row.
template <class X, class S>
Kernel wide_kernel_of(int groups, bool aligned_rows) {
    if (!aligned_rows) return layer_norm_bwd_wide_kernel<X, S, kChunk, false, true>;
    if (groups <= 4) return layer_norm_bwd_wide_kernel<X, S, 4, true, false>;
    if constexpr (sizeof(X) + sizeof(S) == 4)
        if (groups <= 5) return layer_norm_bwd_wide_kernel<X, S, 5, true, false>;
    return layer_norm_bwd_wide_kernel<X, S, kChunk, true, true>;
}

// How rows are divided among threads and CTAs.
struct Sharing {
    bool wide;
    int warps, groups;  // warps of a row; groups of a thread
    int teams;          // teams of a CTA
};

Sharing sharing_of(int cols, bool aligned_rows) {
    const int lanes = lane_groups(cols);
    // The groups of a thread: as many as one warp needs for a row of its own. Where that is too
    // many, two groups if eight warps can then hold the row, because several CTAs then fit on an
    // SM.
    int groups = lanes;
    if (!aligned_rows || (lanes > kMostGroups && lanes <= 2 * kMostWarps)) groups = 2;
    groups = std::min(groups, kMostGroups);
    const int warps = divide_up(lanes, groups), most = cta_warps(groups, aligned_rows);
    if (warps > most) return {true, kWideWarps, divide_up(lanes, kWideWarps), 1};
    return {false, warps, groups, most / warps};
}

int column_blocks(int cols) { return divide_up(cols, 32 * kWeightsWarps * kGroup); }

Launch launch_of(const LayerNormBwd& op, Stream stream, const char* name) {
    Launch launch{};
    launch.name = name;
    launch.shape = shape_of(op);
    launch.stream = stream;
    return launch;
}

}  // namespace

void launch_layer_norm_bwd_reduce(const LayerNormBwd& op, Stream stream) {
    const int warps = std::min(op.partials, kReduceWarps);
    Launch launch = launch_of(op, stream, "layer_norm_bwd_reduce");
    launch.grid = dim3(divide_up(op.cols, 32));
    launch.threads = 32 * warps;
    launch.shared_bytes = launch.threads * sizeof(float2);
    const Reduce params = {{op.partial_dweight, op.partial_dbias}, {op.dweight, op.dbias},
                           op.partials, op.cols, op.weight_dtype};
    gk::launch(layer_norm_bwd_reduce_kernel, launch, params);
}

int layer_norm_bwd_partials(int64_t rows, int cols, int device, int build) {
    if (capability(device) == 90) {
        const int clusters = layer_norm_bwd_sm90_partials(rows, cols, device, build);
        if (clusters > 0) return clusters;
    }
    const int sms = multiprocessors(device);
    const Sharing sharing = sharing_of(cols, true);
    const int most = sharing.wide ? divide_up(4 * sms, column_blocks(cols))
                               : ctas_of_sm(sharing.groups, true) * sms;
    return static_cast<int>(std::min<int64_t>(divide_up(rows, sharing.teams), most));
}

void launch_layer_norm_bwd(const LayerNormBwd& op, int build, Stream stream) {
    if (op.sum_dtype != DType::f32 && op.sum_dtype != op.x_dtype)
        throw Error("layer_norm_bwd on " + shape_of(op) +
                    ": the sum must have the dtype of x, or fp32");
    const Choice choice = choose_layer_norm_bwd(op, build, stream.device);
    if (choice.build != kAnyGpu) return launch_layer_norm_bwd_sm90(op, choice.build, stream);
    dry_run_refused(kLayerNormBwdSm90, choice.reason);
    const bool aligned_rows = is_aligned(op);
    const bool weights = op.partial_dweight != nullptr || op.partial_dbias != nullptr;
    const Sharing sharing = sharing_of(op.cols, aligned_rows);
    const Bwd params = {op, Divisor(op.cols), sharing.warps, 1};
    dispatch_sum(op.x_dtype, op.sum_dtype, [&](auto x, auto s) {
        using X = decltype(x);
        using S = decltype(s);
        if (!sharing.wide) {
            Launch launch = launch_of(op, stream, "layer_norm_bwd");
            launch.grid = dim3(op.partials);
            launch.threads = 32 * sharing.warps * sharing.teams;
            launch.tiles = divide_up(op.rows, sharing.teams);
            launch.shared_bytes =
                kScratchBytes +
                (cta_warps(sharing.groups, aligned_rows) == 4
                     ? bytes_of_rows<X, S, 128>(sharing.groups, aligned_rows, op.dsum != nullptr)
                     : bytes_of_rows<X, S, 256>(sharing.groups, aligned_rows, op.dsum != nullptr));
            gk::launch(kernel_of<X, S>(sharing.groups, aligned_rows), launch, params);
            return;
        }
        Launch launch = launch_of(op, stream, "layer_norm_bwd_wide");
        launch.grid = grid_of(launch.name, launch.shape, op.rows);
        launch.threads = 32 * sharing.warps;
        launch.shared_bytes = sharing.warps * sizeof(float2);
        gk::launch(wide_kernel_of<X, S>(sharing.groups, aligned_rows), launch, params);
        if (!weights) return;
        launch = launch_of(op, stream, "layer_norm_bwd_weights");
        launch.grid = grid_of(launch.name, launch.shape,
                              static_cast<int64_t>(op.partials) * column_blocks(op.cols));
        launch.threads = 32 * kWeightsWarps;
        gk::launch(aligned_rows ? layer_norm_bwd_weights_kernel<X, S, true>
                              : layer_norm_bwd_weights_kernel<X, S, false>,
                   launch, params);
    });
    if (weights) launch_layer_norm_bwd_reduce(op, stream);
}

}  // namespace gk
