// Attention forward on Hopper: the rows that the main loop gets wrong, computed again (the kernel
// is in attention/fwd/sm90/kernel.h).
//
// A weight is 0 where a row does not see a key, but 0 * NaN is NaN: a value that is not finite
// reaches the rows that share its block of keys but do not see it. Only such rows are computed
// again, 16 of a warp together by mma.sync with operands straight from memory. Their values that
// are not finite are left out of the products and added at the end to the rows that see them.
#pragma once

#include "attention/fwd/sm90/load.h"
#include "attention/products.h"
#include "attention/row_end.h"

namespace gk {

// A head's k or v: element `col` of token `row`, 0 where D ends. Rows that do not exist are read as
// the last one that does.
template <class T>
struct Rows {
    const T* first;
    int64_t stride;
    int count, D;

    __device__ T at(int row, int col) const {
        return col < D ? first[min(row, count - 1) * stride + col] : T(0.0f);
    }
    // Two columns, as a register of a fragment.
    __device__ uint32_t pair(int row, int col) const {
        return round_pair<T>(to_float(at(row, col)), to_float(at(row, col + 1)));
    }
};

template <class T>
__device__ __forceinline__ Rows<T> rows_of(const void* x, const Strides& strides, int b, int head,
                                           int count, int D) {
    return {static_cast<const T*>(x) + b * strides.batch + head * strides.head, strides.token,
            count, D};
}

// Whether a value is not finite in the rows first ... last - 1. A warp calls this together.
template <class T>
__device__ __forceinline__ bool any_not_finite(const Rows<T>& rows, int first, int last) {
    bool found = false;
#pragma unroll 1
    for (int row = first; row < last && !__any_sync(0xffffffffu, found); ++row)
        for (int col = lane_index(); col < rows.D; col += 32)
            found = found || !is_finite(to_float(rows.at(row, col)));
    return __any_sync(0xffffffffu, found);
}

// The rows of one warp: the 16 queries from i0 on of one head.
template <class Tiles>
struct FwdSm90Again {
    using T = typename Tiles::Type;
    using M = Mma<T>;

    const FwdSm90Arguments& a;
    const Band& band;
    int b, h, i0;

    __device__ Rows<T> values() const {
        const AttentionCall& call = a.p.call;
        return rows_of<T>(a.p.v, a.p.v_strides, b, h / (call.H / call.Hk), band.count, call.D);
    }

    // Whether a value that is not finite lies where the main loop multiplied it, though one of the
    // rows does not see it. `mine`: the keys of the main loop.
    __device__ __forceinline__ bool needed(const Range& mine) const {
        const int end = min(last_block(mine, Tiles::kKeys) + Tiles::kKeys, band.count);
        const int last_row = min(i0 + 15, band.Tq - 1);
        const Rows<T> v = values();
        return any_not_finite(v, mine.first, min(band.lowest(last_row), end)) ||
               any_not_finite(v, max(band.highest(i0) + 1, mine.first), end);
    }

    // Writes the rows that `lost` names (see lost_rows) to rows row0 ... row0 + 15 of out's tile,
    // and their lse. A warp calls this together.
    __device__ __forceinline__ void attend(const Score& score, const unsigned (&lost)[2],
                                           typename Tiles::Query out, int row0) const {
#pragma unroll 1
        for (int col0 = 0; col0 < Tiles::kWidth; col0 += kCols)
            attend_columns(score, lost, out, row0, col0);
    }

  private:
    // Few columns at a time, with the scores computed for each, since the registers are the main
    // loop's.
    static constexpr int kCols = 32;

    __device__ __forceinline__ void attend_columns(const Score& score, const unsigned (&lost)[2],
                                                   typename Tiles::Query out, int row0,
                                                   int col0) const {
        const AttentionCall& call = a.p.call;
        const int lane = lane_index(), group = lane / 4, pair = lane % 4 * 2;
        const auto q = rows_of<T>(a.p.q, a.p.q_strides, b, h, call.Tq, call.D);
        const auto k = rows_of<T>(a.p.k, a.p.k_strides, b, h / (call.H / call.Hk), band.count,
                                  call.D);
        const Rows<T> v = values();
        const Range keys = band.keys(i0, 16, 16);
        RowState state{{-INFINITY, -INFINITY}, {0, 0}};
        float o[kCols / 8][4] = {};
#pragma unroll 1
        for (int j0 = keys.first; j0 < keys.last; j0 += 16) {
            float s[2][4] = {};
#pragma unroll 1
            for (int d = pair; d < call.D; d += 16) {
                const int i = i0 + group;
                const typename M::A left{{q.pair(i, d), q.pair(i + 8, d), q.pair(i, d + 8),
                                          q.pair(i + 8, d + 8)}};
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    const int j = j0 + 8 * n + group;
                    M::multiply(s[n], left, {{k.pair(j, d), k.pair(j, d + 8)}});
                }
            }
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int i = i0 + group + e / 2 * 8, j = j0 + 8 * n + pair + e % 2;
                    float slope_of_cap;
                    s[n][e] = score(s[n][e], i + band.shift - j, slope_of_cap);
                    if (!band.sees(i, j)) s[n][e] = -INFINITY;
                }
            softmax_step<T>(s, o, state, kLog2e);
            const auto weights = M::from_accumulators(s);
            const auto finite = [&](int j, int col) {
                const float value = to_float(v.at(j, col));
                return is_finite(value) ? value : 0.0f;
            };
#pragma unroll
            for (int d = 0; d < kCols / 8; ++d) {
                const int j = j0 + pair, col = col0 + 8 * d + group;
                M::multiply(o[d], weights,
                            {{round_pair<T>(finite(j, col), finite(j + 1, col)),
                              round_pair<T>(finite(j + 8, col), finite(j + 9, col))}});
            }
        }
#pragma unroll 1
        for (int j0 = keys.first; j0 < keys.last; j0 += 16) {
            if (!any_not_finite(v, j0, min(j0 + 16, keys.last))) continue;
#pragma unroll 1
            for (int j = j0; j < min(j0 + 16, keys.last); ++j) add_not_finite(o, v, j, col0);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            state.l[half] += __shfl_xor_sync(0xffffffffu, state.l[half], 1);
            state.l[half] += __shfl_xor_sync(0xffffffffu, state.l[half], 2);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = i0 + group + 8 * half;
            if ((lost[half] >> (lane & 28) & 15) == 0 || i >= call.Tq) continue;
            const RowEnd end = row_end<T>(call, h, state.m[half], state.l[half]);
#pragma unroll
            for (int d = 0; d < kCols / 8; ++d)
                *reinterpret_cast<Pack<T, 2>*>(
                    out.at(row0 + group + 8 * half, col0 + 8 * d + pair)) =
                    from_floats<T>(o[d][2 * half] * end.scale, o[d][2 * half + 1] * end.scale);
            if (lane % 4 == 0 && col0 == 0)
                a.p.lse[(static_cast<int64_t>(b) * call.H + h) * call.Tq + i] = end.lse;
        }
    }

    // Adds what is not finite of key j's value, in the columns from col0 on, to the rows that see
    // the key.
    __device__ __forceinline__ void add_not_finite(float (&o)[kCols / 8][4], const Rows<T>& v,
                                                   int j, int col0) const {
        const int i = i0 + lane_index() / 4, col = col0 + lane_index() % 4 * 2;
#pragma unroll
        for (int d = 0; d < kCols / 8; ++d)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float value = to_float(v.at(j, col + 8 * d + e % 2));
                if (!is_finite(value) && band.sees(i + e / 2 * 8, j)) o[d][e] += value;
            }
    }
};

}  // namespace gk
