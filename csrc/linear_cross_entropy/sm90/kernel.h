// linear_cross_entropy's products on Hopper: those of linear_cross_entropy/products.cu, in bf16 or
// fp16, with the tiles and roles of the GELU MLP's (gelu_mlp/sm90/tiles.h).
//
// Forward nothing is stored by TMA: the warpgroups that multiply keep a tile's logits in their
// registers, where four neighbouring lanes share a row, and write a few numbers for each row.
// Backward they turn the logits into their gradients, which leave through units in shared memory.
#pragma once

#include <type_traits>

#include "gelu_mlp/sm90/roles.h"
#include "linear_cross_entropy/row.h"

namespace gk {

template <class T, class C, class Params>
struct LogitsConsumer
    : ProductMultiplier<T, C, Layout::forward, LogitsConsumer<T, C, Params>> {
    using Base = ProductMultiplier<T, C, Layout::forward, LogitsConsumer<T, C, Params>>;
    using Shared = typename Base::Shared;
    using Base::acc, Base::consumer;
    using Base::begin, Base::block_row, Base::end, Base::fragment, Base::has_block, Base::put;
    using Base::sixteen, Base::warp_row;

    const Params& params;

    __device__ __forceinline__ LogitsConsumer(const ProductSm90& p, int consumer, unsigned rank,
                                              const Params& params)
        : Base(p, consumer, rank), params(params) {}

    // The first of this lane's columns in a group of eight, and of its rows in a block: it has two
    // neighbouring columns of two rows, eight apart.
    __device__ __forceinline__ static int lane_col() { return lane_index() % 4 * 2; }
    __device__ __forceinline__ static int lane_row() { return warp_row() + lane_index() / 4; }

    // Columns are counted from the tile's first one, n: they have 32 bits. So many are classes.
    __device__ __forceinline__ int classes_of(int64_t n) const {
        return static_cast<int>(min(params.logits.classes - n, static_cast<int64_t>(C::kN)));
    }
    __device__ __forceinline__ const T* bias_of(int64_t n) const {
        return static_cast<const T*>(params.logits.bias) + n;
    }

    __device__ __forceinline__ void store(const ProductPlace& place) {
#pragma unroll
        for (int i = 0; i < C::kBlocks; ++i) {
            if (!has_block(place, i)) break;
            const int64_t row = block_row(place, i) + lane_row();
            if constexpr (std::is_same_v<Params, LossPartials>) {
                store_partials(acc[i], row, place.n);
            } else if (params.logits.softcap == 0.0f) {
                store_gradients<false>(acc[i], row, place.n);
            } else {
                store_gradients<true>(acc[i], row, place.n);
            }
        }
    }

    // ---- forward

    // The branches are the same for all threads, and lie outside of the loops over the logits.
    __device__ __forceinline__ void store_partials(float (&l)[C::kN / 8][4], int64_t first_row,
                                                   int64_t n) const {
        const Logits& logits = params.logits;
        const int classes = classes_of(n) - lane_col();  // from this lane's first column on
        if (logits.bias != nullptr) {
            const T* bias = bias_of(n) + lane_col();
#pragma unroll
            for (int j = 0; j < C::kN / 8; ++j) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float b = 8 * j + i < classes ? to_float(bias[8 * j + i]) : 0.0f;
                    l[j][i] += b;
                    l[j][2 + i] += b;
                }
            }
        }
        if (logits.softcap != 0.0f) {
            const Softcap<T> softcap(logits.softcap);
            float slope;
#pragma unroll
            for (int j = 0; j < C::kN / 8; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) l[j][i] = softcap(l[j][i], slope);
            }
        }
        float sum[2] = {};
        if (params.sum != nullptr) {
#pragma unroll
            for (int j = 0; j < C::kN / 8; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (8 * j + i % 2 < classes) sum[i / 2] += l[j][i];
                }
            }
        }
        if (classes_of(n) < C::kN) {
#pragma unroll
            for (int j = 0; j < C::kN / 8; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (8 * j + i % 2 >= classes) l[j][i] = -INFINITY;
                }
            }
        }
        float highest[2] = {-INFINITY, -INFINITY}, shift[2], exponential[2] = {};
#pragma unroll
        for (int j = 0; j < C::kN / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) highest[i / 2] = max(highest[i / 2], l[j][i]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            highest[half] = max_of_lanes<4>(highest[half]);
            shift[half] = shift_of(highest[half]);
        }
#pragma unroll
        for (int j = 0; j < C::kN / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) exponential[i / 2] += exp_for<T>(l[j][i] - shift[i / 2]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            exponential[half] = sum_of_lanes<4>(exponential[half]);
            sum[half] = sum_of_lanes<4>(sum[half]);
            const int64_t row = first_row + 8 * half;
            if (row >= logits.rows) continue;
            if (lane_col() == 0) {
                const int64_t at = n / C::kN * logits.rows + row;
                params.highest[at] = highest[half];
                params.exponential[at] = exponential[half];
                if (params.sum != nullptr) params.sum[at] = sum[half];
            }
            const int target = column_of(logits.targets[row], n) - lane_col();
            if (target < 0 || target >= classes) continue;
#pragma unroll
            for (int j = 0; j < C::kN / 8; ++j) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if (target == 8 * j + i) params.at_target[row] = l[j][2 * half + i];
                }
            }
        }
    }

    // The target's column, or -1 where that is not in the tile.
    __device__ __forceinline__ static int column_of(int64_t target, int64_t n) {
        return target >= n && target < n + C::kN ? static_cast<int>(target - n) : -1;
    }

    // ---- backward

    template <bool kCapped>
    __device__ __forceinline__ void store_gradients(const float (&block)[C::kN / 8][4],
                                                    int64_t first_row, int64_t n) {
        const Logits& logits = params.logits;
        // TMA stores nothing of rows past the last one.
        const int64_t last = logits.rows - 1;
        const RowGradient<T> upper(params, min(first_row, last));
        const RowGradient<T> lower(params, min(first_row + 8, last));
        const int target[2] = {column_of(upper.target, n) - lane_col(),
                               column_of(lower.target, n) - lane_col()};
        const int classes = classes_of(n) - lane_col();
        const T* bias = bias_of(n) + lane_col();
        const Softcap<T> softcap(logits.softcap);
#pragma unroll
        for (int panel = 0; panel < C::kN / kUnitCols; ++panel) {
            if (kUnitCols * panel >= classes_of(n)) break;
            const int first = begin();
            const auto unit = Shared::unit(consumer, first);
#pragma unroll
            for (int j = 0; j < kUnitCols / 8; j += 2) {
                float d[8];
                sixteen(d, block[8 * panel + j], block[8 * panel + j + 1]);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const int col = kUnitCols * panel + 8 * (j + i / 4) + i % 2;
                    if (logits.bias != nullptr && col < classes) d[i] += to_float(bias[col]);
                    float slope = 1.0f;
                    if constexpr (kCapped) d[i] = softcap(d[i], slope);
                    d[i] = (i / 2 % 2 == 0 ? upper : lower)(d[i], slope, target[i / 2 % 2] == col);
                }
                put(fragment(unit, 8 * j), pack_floats<T>(d));
            }
            end(first);
        }
    }
};

template <class Params>
struct LogitsSm90 {
    ProductSm90 product;
    Params p;
};

template <class T, class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    linear_cross_entropy_fwd_sm90_kernel(const __grid_constant__ LogitsSm90<LossPartials> kernel) {
    run_product<T, C, Layout::forward, false, LogitsConsumer<T, C, LossPartials>>(kernel.product,
                                                                                 kernel.p);
}

template <class T, class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    linear_cross_entropy_bwd_sm90_kernel(
        const __grid_constant__ LogitsSm90<LogitGradients> kernel) {
    run_product<T, C, Layout::forward, true, LogitsConsumer<T, C, LogitGradients>>(kernel.product,
                                                                                  kernel.p);
}

}  // namespace gk
