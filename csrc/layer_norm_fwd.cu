// LayerNorm forward; formulas, shapes and bytes are in layer_norm.h.
//
// A row is read once and stays in registers, in the dtype of s, through both passes of the
// statistics: one warp a row up to 1,792 columns (every GPT-2 width), several warps above, 16 of
// them up to 32,768 columns of a 16-bit s or 28,672 of a fp32 one. Wider rows go through the same
// kernel in chunks, which the second and third pass read again from L2.
#include "launch.h"

#include <algorithm>

#include "device/reduce.h"
#include "layer_norm.h"
#include "layer_norm_row.h"

namespace gk {
namespace {

constexpr int kMaxWarps = 16;
constexpr int kRowsOfCta = 4;  // of one warp each
constexpr int kChunk = 4;      // groups of a thread, in a row too wide for registers
constexpr size_t kSharedBytes = kMaxWarps * (sizeof(float) + sizeof(float2));

struct Fwd {
    LayerNormFwd op;
    int warps;  // of a row
};

// One thread's part of a row, or of a chunk of it: kGroups groups from group `first` on.
template <class X, class S, int kGroups, bool kAligned>
struct Part {
    const LayerNormFwd& op;
    int64_t row;
    Team team;
    DropoutKey key;
    Pack<S, kGroup> s[kGroups];

    // Groups whose loads are under way together: as many as registers allow.
    static constexpr int kLoads = !kAligned ? 1 : kGroups * sizeof(S) < 16 ? 4 : 2;

    // dropout(x) + residual, rounded.
    __device__ __forceinline__ void sum(int first) {
#pragma unroll
        for (int g = 0; g < kGroups; g += kLoads) sum_batch(first, g);
    }

    __device__ __forceinline__ void sum_batch(int first, int begin) {
        constexpr int kCount = kLoads < kGroups ? kLoads : kGroups;
        Pack<X, kGroup> x[kCount];
        RawGroup<sizeof(S)> residual[kCount];  // 16-bit where s is
        const X* x_row = static_cast<const X*>(op.x) + row * op.x_stride;
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            if (begin + i < kGroups)
                x[i] = load_group<kAligned>(x_row, team.col(first + begin + i), op.cols);
        if (op.residual != nullptr) {
#pragma unroll
            for (int i = 0; i < kCount; ++i)
                if (begin + i < kGroups)
                    load_raw<kAligned>(residual[i], op.residual, row * op.residual_stride,
                                       op.residual_dtype, team.col(first + begin + i), op.cols);
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            if (begin + i >= kGroups) break;
            const int col = team.col(first + begin + i);
            float values[kGroup];
            unpack_floats(values, x[i]);
            if (op.dropout.rng != nullptr && col < op.cols)
                drop(values, row * op.cols + col, key, op.dropout.scale);
            if (op.residual != nullptr) {
                float added[kGroup];
                unpack_raw(added, residual[i], op.residual_dtype);
#pragma unroll
                for (int j = 0; j < kGroup; ++j) values[j] += added[j];
            }
            s[begin + i] = pack_floats<S>(values);
        }
    }

    __device__ __forceinline__ void store_sum(int first) const {
        S* s_row = static_cast<S*>(op.sum) + row * op.cols;
#pragma unroll
        for (int g = 0; g < kGroups; ++g)
            store_group<kAligned>(s_row, team.col(first + g), op.cols, s[g]);
    }

    // What this thread itself stored, or x.
    __device__ __forceinline__ void load_sum(int first) {
        const S* s_row = op.sum == nullptr ? static_cast<const S*>(op.x) + row * op.x_stride
                                           : static_cast<const S*>(op.sum) + row * op.cols;
#pragma unroll
        for (int g = 0; g < kGroups; ++g)
            s[g] = load_group<kAligned>(s_row, team.col(first + g), op.cols);
    }

    // Between passes: many unpacked values are not kept.
    __device__ __forceinline__ void forget_values() {
        if constexpr (kGroups > 4 && sizeof(S) == 2) {
#pragma unroll
            for (int g = 0; g < kGroups; ++g) forget(s[g]);
        }
    }

    __device__ __forceinline__ float total() const {
        float total = 0.0f;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            float values[kGroup];
            unpack_floats(values, s[g]);
            total += group_sum(values);
        }
        return total;
    }

    // Squared distances from the mean, and the distances: what rounding took from a large mean is
    // what they still sum to.
    __device__ __forceinline__ float2 centred(int first, float mean) const {
        float2 sums = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            const int col = team.col(first + g);
            float values[kGroup], squares[kGroup];
            unpack_floats(values, s[g]);
#pragma unroll
            for (int j = 0; j < kGroup; ++j) {
                const bool inside = col + (kAligned ? 0 : j) < op.cols;
                values[j] = inside ? values[j] - mean : 0.0f;
                squares[j] = values[j] * values[j];
            }
            sums.x += group_sum(squares);
            sums.y += group_sum(values);
        }
        return sums;
    }

    __device__ __forceinline__ void store_normalised(int first, float mean, float rstd) const {
        X* y_row = static_cast<X*>(op.y) + row * op.cols;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            const int col = team.col(first + g);
            if (col >= op.cols) break;
            float values[kGroup], weight[kGroup], bias[kGroup] = {};
            load_floats<kAligned>(weight, op.weight, op.weight_dtype, col, op.cols);
            if (op.bias != nullptr)
                load_floats<kAligned>(bias, op.bias, op.weight_dtype, col, op.cols);
            unpack_floats(values, s[g]);
#pragma unroll
            for (int j = 0; j < kGroup; ++j)
                values[j] = (values[j] - mean) * rstd * weight[j] + bias[j];
            store_group<kAligned>(y_row, col, op.cols, pack_floats<X>(values));
        }
    }
};

// A row for each team: several teams of one warp a CTA, or one team of several warps. Without
// kWide the whole row is one chunk, which stays in registers.
template <class X, class S, int kGroups, bool kAligned, bool kWide>
__global__ void __launch_bounds__(32 * kMaxWarps)
    layer_norm_fwd_kernel(const __grid_constant__ Fwd p) {
    const LayerNormFwd& op = p.op;
    const Team team(p.warps);
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / team.threads) + team.index;
    if (row >= op.rows) return;  // a whole warp, which shares its CTA's barriers with no other
    Part<X, S, kGroups, kAligned> part{op, row, team, {}, {}};
    if (op.dropout.rng != nullptr) part.key = dropout_key(op.dropout);
    float2* scratch = reinterpret_cast<float2*>(shared_memory());  // of kMaxWarps, then as floats

    float total = 0.0f;
    int first = 0;
    do {
        part.sum(first);
        if (op.sum != nullptr) part.store_sum(first);
        total += part.total();
        first += kGroups;
    } while (kWide && team.col(first) < op.cols);
    total = team_sum(total, p.warps, reinterpret_cast<float*>(scratch + kMaxWarps));
    float mean = total / op.cols;

    // E[s^2] - mean^2 would cancel. What is past the end of the row counts as the mean.
    float2 sums = make_float2(0.0f, 0.0f);
    first = 0;
    do {
        if (kWide)
            part.load_sum(first);
        else
            part.forget_values();
        const float2 more = part.centred(first, mean);
        sums = make_float2(sums.x + more.x, sums.y + more.y);
        first += kGroups;
    } while (kWide && team.col(first) < op.cols);
    sums = team_sum(sums, p.warps, scratch);
    const float shift = sums.y / op.cols;
    const float rstd = rsqrtf(sums.x / op.cols - shift * shift + op.eps);
    mean += shift;
    if (team.thread == 0) {
        op.mean[row] = mean;
        op.rstd[row] = rstd;
    }

    first = 0;
    do {
        if (kWide)
            part.load_sum(first);
        else
            part.forget_values();
        part.store_normalised(first, mean, rstd);
        first += kGroups;
    } while (kWide && team.col(first) < op.cols);
}

using Kernel = void (*)(Fwd);

// For rows of so many groups a thread.
template <class X, class S>
Kernel kernel_of(int groups, bool is_aligned) {
    if (!is_aligned)
        return groups <= 2 ? layer_norm_fwd_kernel<X, S, 2, false, false>
                           : layer_norm_fwd_kernel<X, S, 2, false, true>;
    switch (groups) {
        case 1: return layer_norm_fwd_kernel<X, S, 1, true, false>;
        case 2: return layer_norm_fwd_kernel<X, S, 2, true, false>;
        case 3: return layer_norm_fwd_kernel<X, S, 3, true, false>;
        case 4: return layer_norm_fwd_kernel<X, S, 4, true, false>;
        case 5: return layer_norm_fwd_kernel<X, S, 5, true, false>;
        case 6:
        case 7: return layer_norm_fwd_kernel<X, S, 7, true, false>;
    }
    if constexpr (sizeof(S) == 2)
        if (groups == 8) return layer_norm_fwd_kernel<X, S, 8, true, false>;
    return layer_norm_fwd_kernel<X, S, kChunk, true, true>;
}

}  // namespace

void launch_layer_norm_fwd(const LayerNormFwd& op, Stream stream) {
    if (op.sum_dtype != DType::f32 &&
        (op.sum_dtype != op.x_dtype ||
         (op.residual != nullptr && op.residual_dtype == DType::f32)))
        throw Error("layer_norm_fwd on " + shape_of(op.rows, op.cols, op.x_dtype) +
                    ": the sum must have the dtype of x, or fp32, which a fp32 residual needs");
    const bool is_aligned = aligned(op.cols) && aligned(op.x) && aligned(op.x_stride) &&
                            aligned(op.residual) && aligned(op.residual_stride) &&
                            aligned(op.weight) && aligned(op.bias) && aligned(op.y) &&
                            aligned(op.sum);
    const int groups = lane_groups(op.cols);
    const int most = is_aligned ? 7 : 2, usual = is_aligned ? 4 : 2;  // of one warp, of several
    const int warps = groups <= most ? 1 : std::min(divide_up(groups, usual), kMaxWarps);
    const int rows = warps == 1 ? kRowsOfCta : 1;
    Launch launch{};
    launch.name = "layer_norm_fwd";
    launch.shape = shape_of(op.rows, op.cols, op.x_dtype);
    launch.grid = dim3(static_cast<unsigned>(divide_up(op.rows, rows)));
    launch.threads = 32 * warps * rows;
    launch.shared_bytes = warps == 1 ? 0 : kSharedBytes;
    launch.stream = stream;
    dispatch_sum(op.x_dtype, op.sum_dtype, [&](auto x, auto s) {
        const Kernel kernel =
            kernel_of<decltype(x), decltype(s)>(divide_up(groups, warps), is_aligned);
        gk::launch(kernel, launch, Fwd{op, warps});
    });
}

}  // namespace gk
