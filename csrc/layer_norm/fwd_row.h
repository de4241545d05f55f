// How the kernels of LayerNorm's forward pass process a row; formulas, shapes and bytes are in
// layer_norm/params.h. A row is read once and stays in registers, in the dtype of s, through both
// passes of the statistics. A row that is too wide for that is read again in chunks for each pass.
#pragma once

#include "device/reduce.h"
#include "layer_norm/row.h"

namespace gk {

struct Fwd {
    LayerNormFwd op;
    Divisor cols;
    int warps;  // warps of one CTA that share a row
    int ctas;   // CTAs that share a row
};

// One thread's part of a row, or of a chunk of it: kGroups groups from group `first` on.
template <class X, class S, int kGroups, bool kAligned>
struct FwdPart {
    const LayerNormFwd& op;
    int64_t row;
    Team team;
    DropoutKey key;
    Pack<S, kGroup> s[kGroups];

    // Groups whose loads are in flight together: as many as registers allow.
    static constexpr int kLoads = !kAligned ? 1 : kGroups * sizeof(S) < 16 ? 4 : 2;

    // s = dropout(x) + residual, rounded.
    __device__ __forceinline__ void sum(int first) {
#pragma unroll
        for (int g = 0; g < kGroups; g += kLoads) sum_batch(first, g);
    }

    __device__ __forceinline__ void sum_batch(int first, int begin) {
        constexpr int kCount = kLoads < kGroups ? kLoads : kGroups;
        Pack<X, kGroup> x[kCount];
        RawGroup<sizeof(S)> residual[kCount];  // 16-bit elements where s has them
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

    // Loads s: what this thread itself stored, or x where s is x.
    __device__ __forceinline__ void load_sum(int first) {
        const S* s_row = op.sum == nullptr ? static_cast<const S*>(op.x) + row * op.x_stride
                                           : static_cast<const S*>(op.sum) + row * op.cols;
#pragma unroll
        for (int g = 0; g < kGroups; ++g)
            s[g] = load_group<kAligned>(s_row, team.col(first + g), op.cols);
    }

    // Between passes: keeps the compiler from holding many unpacked values in registers.
    __device__ __forceinline__ void forget_values() {
        if constexpr (kGroups > 4 && sizeof(S) == 2) {
#pragma unroll
            for (int g = 0; g < kGroups; ++g) forget(s[g]);
        }
    }

    __device__ __forceinline__ float total(int first) const {
        float total = 0.0f;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            if (kAligned && team.col(first + g) >= op.cols) break;
            float values[kGroup];
            unpack_floats(values, s[g]);
            total += group_sum(values);
        }
        return total;
    }

    // The sum of the squared distances from the mean, and the sum of the distances. The latter is
    // what rounding took from a large mean, times the number of columns.
    __device__ __forceinline__ float2 centred(int first, float mean) const {
        float2 sums = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            const int col = team.col(first + g);
            if (kAligned && col >= op.cols) break;
            float values[kGroup];
            unpack_floats(values, s[g]);
#pragma unroll
            for (int j = 0; j < kGroup; ++j)
                values[j] = kAligned || col + j < op.cols ? values[j] - mean : 0.0f;
            sums.x += group_dot(values, values);
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

// Normalises the team's row. Without kChunks the whole row is one chunk, which stays in registers.
// total_of(value) returns the sum of all threads' values to each thread of the team. It is called
// first with a float, then with a float2.
template <class X, class S, int kGroups, bool kAligned, bool kChunks, class Total>
__device__ __forceinline__ void normalise_row(const Fwd& p, const Team& team, int64_t row,
                                              const Total& total_of) {
    const LayerNormFwd& op = p.op;
    FwdPart<X, S, kGroups, kAligned> part{op, row, team, {}, {}};
    if (op.dropout.rng != nullptr) part.key = dropout_key(op.dropout);

    float total = 0.0f;
    int first = 0;
    do {
        part.sum(first);
        if (op.sum != nullptr) part.store_sum(first);
        total += part.total(first);
        first += kGroups;
    } while (kChunks && team.col(first) < op.cols);
    float mean = divide(total_of(total), p.cols);

    // E[s^2] - mean^2 would cancel. Columns past the end of the row count as if they held the mean.
    float2 sums = make_float2(0.0f, 0.0f);
    first = 0;
    do {
        if (kChunks)
            part.load_sum(first);
        else
            part.forget_values();
        const float2 more = part.centred(first, mean);
        sums = make_float2(sums.x + more.x, sums.y + more.y);
        first += kGroups;
    } while (kChunks && team.col(first) < op.cols);
    sums = total_of(sums);
    const float shift = divide(sums.y, p.cols);
    const float rstd = rsqrtf(divide(sums.x, p.cols) - shift * shift + op.eps);
    mean += shift;
    if (team.thread == 0) {
        op.mean[row] = mean;
        op.rstd[row] = rstd;
    }

    first = 0;
    do {
        if (kChunks)
            part.load_sum(first);
        else
            part.forget_values();
        part.store_normalised(first, mean, rstd);
        first += kGroups;
    } while (kChunks && team.col(first) < op.cols);
}

}  // namespace gk
