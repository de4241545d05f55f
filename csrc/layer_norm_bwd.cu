// LayerNorm backward; formulas, shapes and bytes are in layer_norm.h.
//
// The CTAs are persistent: each takes rows in turn, keeps a row in registers between its two passes
// (the sums over it, then its gradients) and adds up its share of dweight and dbias, in registers
// too, over all its rows. A second, small kernel adds the CTAs' shares in a fixed order: no atomics,
// the same bits every time.
//
// Up to 8,192 columns up to eight warps share a CTA: eight rows of one warp, four of two ... Wider
// rows do not fit beside their sums: there one kernel gives the gradients of the rows, reading each
// twice (the second time from L2), another the shares of dweight and dbias by columns.
#include "launch.h"

#include <algorithm>

#include "device/reduce.h"
#include "layer_norm.h"
#include "layer_norm_row.h"

namespace gk {
namespace {

constexpr int kMostGroups = 4;  // of a thread
constexpr int kUnalignedGroups = 2;
constexpr int kMostWarps = 8;

// Warps of a CTA of the persistent kernel, and how many CTAs its registers leave room for on an SM.
constexpr int cta_warps(int groups) { return groups == kMostGroups ? kMostWarps : 4; }
constexpr int ctas_of_sm(int groups) { return groups == 1 ? 5 : groups < kMostGroups ? 3 : 1; }

constexpr int kWideWarps = 16;    // of a CTA with a row too wide for registers
constexpr int kChunk = 2;         // groups of a thread, in such a row
constexpr int kWeightsWarps = 8;  // of a CTA with a block of columns of such rows
constexpr int kReduceWarps = 32;  // at most, of a CTA that adds up 32 columns of the shares

struct Bwd {
    LayerNormBwd op;
    int warps;  // of a row
};

template <class X, class S>
__device__ __forceinline__ void add_weight_gradient(float (&dweight)[kGroup],
                                                    float (&dbias)[kGroup],
                                                    const Pack<X, kGroup>& dy,
                                                    const Pack<S, kGroup>& s, float mean,
                                                    float rstd) {
    float gradient[kGroup], values[kGroup];
    unpack_floats(gradient, dy);
    unpack_floats(values, s);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
        dweight[j] += gradient[j] * ((values[j] - mean) * rstd);
        dbias[j] += gradient[j];
    }
}

// One thread's part of a row, or of a chunk of it: kGroups groups from group `first` on.
template <class X, class S, int kGroups, bool kAligned>
struct Part {
    const LayerNormBwd& op;
    Team team;
    DropoutKey key;
    int64_t row;
    int cols;  // 0 for a row past the last
    float mean, rstd;
    Pack<X, kGroup> dy[kGroups];
    Pack<S, kGroup> s[kGroups], dsum[kGroups];

    __device__ __forceinline__ void start(int64_t index) {
        row = index;
        cols = row < op.rows ? op.cols : 0;
        mean = cols > 0 ? op.mean[row] : 0.0f;
        rstd = cols > 0 ? op.rstd[row] : 0.0f;
    }

    // Loads of a row are under way together.
    __device__ __forceinline__ void load(int first) {
        const X* dy_row = static_cast<const X*>(op.dy) + row * op.cols;
        const S* s_row = static_cast<const S*>(op.sum) + row * op.sum_stride;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            dy[g] = load_group<kAligned>(dy_row, team.col(first + g), cols);
            s[g] = load_group<kAligned>(s_row, team.col(first + g), cols);
        }
    }

    __device__ __forceinline__ void load_dsum(int first) {
        const S* dsum_row = static_cast<const S*>(op.dsum) + (op.dsum == nullptr ? 0 : row * op.cols);
#pragma unroll
        for (int g = 0; g < kGroups; ++g)
            dsum[g] = load_group<kAligned>(dsum_row, team.col(first + g),
                                           op.dsum == nullptr ? 0 : cols);
    }

    // g = dy weight and x^.
    __device__ __forceinline__ void expand(int first, int index, float (&g)[kGroup],
                                           float (&normalised)[kGroup]) const {
        float weight[kGroup];
        load_floats<kAligned>(weight, op.weight, op.weight_dtype, team.col(first + index), op.cols);
        unpack_floats(g, dy[index]);
        unpack_floats(normalised, s[index]);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
            g[j] *= weight[j];
            normalised[j] = (normalised[j] - mean) * rstd;
        }
    }

    // Of g and of g x^. What is past the end of the row has dy = 0.
    __device__ __forceinline__ float2 sums(int first) const {
        float2 sums = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            float g[kGroup], normalised[kGroup];
            expand(first, i, g, normalised);
            sums.x += group_sum(g);
#pragma unroll
            for (int j = 0; j < kGroup; ++j) g[j] *= normalised[j];
            sums.y += group_sum(g);
        }
        return sums;
    }

    __device__ __forceinline__ void add_weight_gradients(float (&dweight)[kGroups][kGroup],
                                                         float (&dbias)[kGroups][kGroup]) const {
#pragma unroll
        for (int i = 0; i < kGroups; ++i)
            add_weight_gradient(dweight[i], dbias[i], dy[i], s[i], mean, rstd);
    }

    // Between the passes: unpacked values are not kept.
    __device__ __forceinline__ void forget_values() {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            forget(dy[g]);
            forget(s[g]);
        }
    }

    // The gradient of s, with what arrives through s itself, then split between the residual and
    // dropout's input.
    __device__ __forceinline__ void store(int first, float2 means) const {
        const int64_t start = row * op.cols;
        X* dx_row = static_cast<X*>(op.dx) + start;
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const int col = team.col(first + i);
            if (col >= cols) break;
            float g[kGroup], normalised[kGroup], ds[kGroup];
            expand(first, i, g, normalised);
            unpack_floats(ds, dsum[i]);
#pragma unroll
            for (int j = 0; j < kGroup; ++j)
                ds[j] += rstd * (g[j] - means.x - normalised[j] * means.y);
            if (op.dresidual != nullptr)
                store_floats<kAligned>(op.dresidual, start, op.residual_dtype, col, cols, ds);
            if (op.dropout.rng != nullptr) drop(ds, start + col, key, op.dropout.scale);
            store_group<kAligned>(dx_row, col, cols, pack_floats<X>(ds));
        }
    }
};

// A CTA's sums of dweight or dbias, from those of its teams: added in shared memory, one team after
// the other. shared: one float for each column that a team may hold.
template <int kGroups, bool kAligned>
__device__ __forceinline__ void store_share(float (&sums)[kGroups][kGroup], float* shares,
                                            const Team& team, int teams, int cols, float* shared) {
    for (int turn = 0; turn < teams; ++turn) {
        __syncthreads();
        if (team.index != turn) continue;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
#pragma unroll
            for (int j = 0; j < kGroup; ++j) {
                float* at = shared + (g * kGroup + j) * team.threads + team.thread;
                if (turn > 0) sums[g][j] += *at;
                if (turn + 1 < teams) *at = sums[g][j];
            }
            if (turn + 1 == teams)
                store_group<kAligned>(shares + static_cast<int64_t>(blockIdx.x) * cols,
                                      team.col(g), cols, pack_floats<float>(sums[g]));
        }
    }
}

template <class X, class S, int kGroups, bool kAligned>
__global__ void __launch_bounds__(32 * cta_warps(kGroups), ctas_of_sm(kGroups))
    layer_norm_bwd_kernel(const __grid_constant__ Bwd p) {
    // With the row's other loads, if there are registers for it until the second pass.
    constexpr bool kDsumEarly = kAligned && kGroups * sizeof(S) <= 8;
    const LayerNormBwd& op = p.op;
    Part<X, S, kGroups, kAligned> part{op, Team(p.warps)};
    const Team& team = part.team;
    const int teams = blockDim.x / team.threads;
    if (op.dropout.rng != nullptr) part.key = dropout_key(op.dropout);
    float2* scratch = reinterpret_cast<float2*>(shared_memory());  // two of kMostWarps, in turn
    float dweight[kGroups][kGroup] = {}, dbias[kGroups][kGroup] = {};

    int turn = 0;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * teams; first < op.rows;
         first += static_cast<int64_t>(gridDim.x) * teams) {
        // A team without a row goes along for the barriers, with zeros.
        part.start(first + team.index);
        part.load(0);
        if (kDsumEarly) part.load_dsum(0);
        part.add_weight_gradients(dweight, dbias);
        // The next row's sums are written while a slow warp may still read these.
        float2 sums = team_sum(part.sums(0), p.warps, scratch + turn * kMostWarps);
        turn ^= 1;
        part.forget_values();
        if (!kDsumEarly) part.load_dsum(0);
        part.store(0, make_float2(sums.x / op.cols, sums.y / op.cols));
    }

    float* shared = reinterpret_cast<float*>(scratch + 2 * kMostWarps);
    if (op.partial_dweight != nullptr)
        store_share<kGroups, kAligned>(dweight, op.partial_dweight, team, teams, op.cols, shared);
    if (op.partial_dbias != nullptr)
        store_share<kGroups, kAligned>(dbias, op.partial_dbias, team, teams, op.cols, shared);
}

// The gradients of one row for each CTA.
template <class X, class S, bool kAligned>
__global__ void __launch_bounds__(32 * kWideWarps)
    layer_norm_bwd_wide_kernel(const __grid_constant__ Bwd p) {
    const LayerNormBwd& op = p.op;
    Part<X, S, kChunk, kAligned> part{op, Team(p.warps)};
    if (op.dropout.rng != nullptr) part.key = dropout_key(op.dropout);
    part.start(blockIdx.x);
    float2 sums = make_float2(0.0f, 0.0f);
    for (int first = 0; part.team.col(first) < op.cols; first += kChunk) {
        part.load(first);
        const float2 more = part.sums(first);
        sums = make_float2(sums.x + more.x, sums.y + more.y);
    }
    sums = team_sum(sums, p.warps, reinterpret_cast<float2*>(shared_memory()));
    const float2 means = make_float2(sums.x / op.cols, sums.y / op.cols);
    for (int first = 0; part.team.col(first) < op.cols; first += kChunk) {
        part.load(first);
        part.load_dsum(first);
        part.store(first, means);
    }
}

// Shares of dweight and dbias where rows are wide: CTA (share, block of columns) adds up every
// partials-th row in the columns of its threads, eight each.
template <class X, class S, bool kAligned>
__global__ void __launch_bounds__(32 * kWeightsWarps)
    layer_norm_bwd_weights_kernel(const __grid_constant__ Bwd p) {
    const LayerNormBwd& op = p.op;
    const int share = blockIdx.x % op.partials, block = blockIdx.x / op.partials;
    const int col = (block * blockDim.x + threadIdx.x) * kGroup;
    float dweight[kGroup] = {}, dbias[kGroup] = {};
#pragma unroll 4
    for (int64_t row = share; row < op.rows; row += op.partials) {
        const auto dy = load_group<kAligned>(static_cast<const X*>(op.dy) + row * op.cols, col,
                                             op.cols);
        const auto s = load_group<kAligned>(static_cast<const S*>(op.sum) + row * op.sum_stride,
                                            col, op.cols);
        add_weight_gradient(dweight, dbias, dy, s, op.mean[row], op.rstd[row]);
    }
    const int64_t start = static_cast<int64_t>(share) * op.cols;
    if (op.partial_dweight != nullptr)
        store_group<kAligned>(op.partial_dweight + start, col, op.cols,
                              pack_floats<float>(dweight));
    if (op.partial_dbias != nullptr)
        store_group<kAligned>(op.partial_dbias + start, col, op.cols, pack_floats<float>(dbias));
}

struct Reduce {
    const float* shares[2];  // (partials, cols) each, or null
    void* totals[2];         // (cols,), dtype
    int partials, cols;
    DType dtype;
};

// A column for each lane; every warp adds up some of the shares, then warp 0 the warps' sums.
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
Kernel kernel_of(int groups, bool is_aligned) {
    if (!is_aligned) return layer_norm_bwd_kernel<X, S, kUnalignedGroups, false>;
    switch (groups) {
        case 1: return layer_norm_bwd_kernel<X, S, 1, true>;
        case 2: return layer_norm_bwd_kernel<X, S, 2, true>;
        case 3: return layer_norm_bwd_kernel<X, S, 3, true>;
    }
    return layer_norm_bwd_kernel<X, S, kMostGroups, true>;
}

// How rows are shared out.
struct Plan {
    bool wide;
    int warps, groups;  // of a row; of a thread
    int teams;          // of a CTA
};

Plan plan_of(int cols, bool is_aligned) {
    const int groups = lane_groups(cols), most = is_aligned ? kMostGroups : kUnalignedGroups;
    const int warps = divide_up(groups, most);
    if (warps > cta_warps(most)) return {true, kWideWarps, kChunk, 1};
    const int of_thread = is_aligned ? divide_up(groups, warps) : kUnalignedGroups;
    return {false, warps, of_thread, cta_warps(of_thread) / warps};
}

int column_blocks(int cols) { return divide_up(cols, 32 * kWeightsWarps * kGroup); }

Launch launch_of(const LayerNormBwd& op, Stream stream, const char* name) {
    Launch launch{};
    launch.name = name;
    launch.shape = shape_of(op.rows, op.cols, op.x_dtype);
    launch.stream = stream;
    return launch;
}

void launch_reduce(const LayerNormBwd& op, Stream stream) {
    const int warps = std::min(op.partials, kReduceWarps);
    Launch launch = launch_of(op, stream, "layer_norm_bwd_reduce");
    launch.grid = dim3(divide_up(op.cols, 32));
    launch.threads = 32 * warps;
    launch.shared_bytes = launch.threads * sizeof(float2);
    const Reduce params = {{op.partial_dweight, op.partial_dbias}, {op.dweight, op.dbias},
                           op.partials, op.cols, op.weight_dtype};
    gk::launch(layer_norm_bwd_reduce_kernel, launch, params);
}

}  // namespace

int layer_norm_bwd_partials(int64_t rows, int cols, int device) {
    const int sms = multiprocessors(device);
    const Plan plan = plan_of(cols, true);
    const int most = plan.wide ? divide_up(4 * sms, column_blocks(cols))
                               : ctas_of_sm(plan.groups) * sms;
    return static_cast<int>(std::min<int64_t>(divide_up(rows, plan.teams), most));
}

void launch_layer_norm_bwd(const LayerNormBwd& op, Stream stream) {
    if (op.sum_dtype != DType::f32 && op.sum_dtype != op.x_dtype)
        throw Error("layer_norm_bwd on " + shape_of(op.rows, op.cols, op.x_dtype) +
                    ": the sum must have the dtype of x, or fp32");
    const bool is_aligned = aligned(op.cols) && aligned(op.dy) && aligned(op.dsum) &&
                            aligned(op.sum) && aligned(op.sum_stride) && aligned(op.weight) &&
                            aligned(op.dx) && aligned(op.dresidual) &&
                            aligned(op.partial_dweight) && aligned(op.partial_dbias);
    const bool weights = op.partial_dweight != nullptr || op.partial_dbias != nullptr;
    const Plan plan = plan_of(op.cols, is_aligned);
    const Bwd params = {op, plan.warps};
    dispatch_sum(op.x_dtype, op.sum_dtype, [&](auto x, auto s) {
        using X = decltype(x);
        using S = decltype(s);
        if (!plan.wide) {
            const int threads = 32 * plan.warps;  // of a row
            Launch launch = launch_of(op, stream, "layer_norm_bwd");
            launch.grid = dim3(op.partials);
            launch.threads = threads * plan.teams;
            launch.shared_bytes = 2 * kMostWarps * sizeof(float2) +
                                  threads * plan.groups * kGroup * sizeof(float);
            gk::launch(kernel_of<X, S>(plan.groups, is_aligned), launch, params);
            return;
        }
        Launch launch = launch_of(op, stream, "layer_norm_bwd_wide");
        launch.grid = dim3(static_cast<unsigned>(op.rows));
        launch.threads = 32 * plan.warps;
        launch.shared_bytes = plan.warps * sizeof(float2);
        gk::launch(is_aligned ? layer_norm_bwd_wide_kernel<X, S, true>
                              : layer_norm_bwd_wide_kernel<X, S, false>,
                   launch, params);
        if (!weights) return;
        launch = launch_of(op, stream, "layer_norm_bwd_weights");
        launch.grid = dim3(op.partials * column_blocks(op.cols));
        launch.threads = 32 * kWeightsWarps;
        gk::launch(is_aligned ? layer_norm_bwd_weights_kernel<X, S, true>
                              : layer_norm_bwd_weights_kernel<X, S, false>,
                   launch, params);
    });
    if (weights) launch_reduce(op, stream);
}

}  // namespace gk
