// The kernel for the GELU MLP's products on Hopper: what becomes of their results.
#pragma once

#include "gelu_mlp/epilogue.h"
#include "gelu_mlp/sm90/roles.h"

namespace gk {

template <class T, class C, Layout kLayout>
struct ProductConsumer : ProductMultiplier<T, C, kLayout, ProductConsumer<T, C, kLayout>> {
    using Base = ProductMultiplier<T, C, kLayout, ProductConsumer<T, C, kLayout>>;
    using Shared = typename Base::Shared;
    using Base::Base;
    using Base::p, Base::consumer, Base::acc;
    using Base::begin, Base::end, Base::fragment, Base::has_block, Base::put, Base::sixteen;
    using Base::warp_row;

    // The kernel branches once a tile and never between the values of a unit, so that the compiler
    // can interleave their work.
    enum class Finish { plain, tanh, erf };

    template <Finish kFinish>
    __device__ __forceinline__ void finish(float (&d)[8], T* out, T* activation,
                                           uint32_t bias_low, uint32_t bias_high) const {
        constexpr bool kTanh = kFinish == Finish::tanh;
        if constexpr (kLayout == Layout::forward) {
            const float2 low = floats_of<T>(bias_low), high = floats_of<T>(bias_high);
            d[0] += low.x, d[1] += low.y, d[2] += low.x, d[3] += low.y;
            d[4] += high.x, d[5] += high.y, d[6] += high.x, d[7] += high.y;
            const Pack<T, 8> rounded = pack_floats<T>(d);
            if (kFinish == Finish::plain || p.has_out) put(out, rounded);
            if constexpr (kFinish != Finish::plain) {
                activate<kTanh>(d, rounded);
                put(activation, pack_floats<T>(d));
            }
        } else if constexpr (kFinish != Finish::plain) {
            uint32_t words[4];
            ldmatrix_x4(words, out);  // h lies where dh will go
            Pack<T, 8> pack;
            memcpy(&pack, words, sizeof pack);
            float h[8];
            unpack_floats(h, pack);
            differentiate<kTanh>(d, h);
            if (p.has_activation) put(activation, pack_floats<T>(h));
            put(out, pack_floats<T>(d));
        } else {
            put(out, pack_floats<T>(d));
        }
    }

    // Loads this lane's pairs of the bias in a unit's 8-column groups; they stay 0 without a bias.
    // Groups past the end of a row load the first group, which saves a branch.
    __device__ __forceinline__ void load_bias(uint32_t (&pairs)[kUnitCols / 8], int col) const {
        if (p.bias == nullptr) return;
        const int lane_col = lane_index() % 4 * 2, cols = static_cast<int>(p.n);
#pragma unroll
        for (int j = 0; j < kUnitCols / 8; ++j) {
            const int from = (col + 8 * j < cols ? col + 8 * j : 0) + lane_col;
            pairs[j] = *reinterpret_cast<const uint32_t*>(static_cast<const T*>(p.bias) + from);
        }
    }

    __device__ __forceinline__ void store(const ProductPlace& place) {
        if constexpr (kLayout == Layout::weight) {
            p.wide ? store_partial(place) : store_units<Finish::plain>(place);
        } else {
            if (kLayout == Layout::backward && p.wide) {
                store_partial(place);
            } else if (kLayout == Layout::forward ? !p.has_activation : !p.has_h) {
                store_units<Finish::plain>(place);
            } else if (p.tanh) {
                store_units<Finish::tanh>(place);
            } else {
                store_units<Finish::erf>(place);
            }
        }
    }

    template <Finish kFinish>
    __device__ __forceinline__ void store_units(const ProductPlace& place) {
#pragma unroll
        for (int i = 0; i < C::kBlocks; ++i) {
            if (!has_block(place, i)) break;
            store_block<kFinish>(acc[i], static_cast<int>(place.n));
        }
    }

    template <Finish kFinish>
    __device__ __forceinline__ void store_block(const float (&block)[C::kN / 8][4], int n) {
#pragma unroll
        for (int panel = 0; panel < C::kN / kUnitCols; ++panel) {
            const int col = n + kUnitCols * panel;
            if (col >= p.n) break;
            uint32_t bias[kUnitCols / 8] = {};
            if constexpr (kLayout == Layout::forward) load_bias(bias, col);
            const int first = begin();
            const auto out = Shared::unit(consumer, first);
            const auto activation = Shared::unit(consumer, first + p.outputs() - 1);
#pragma unroll
            for (int j = 0; j < kUnitCols / 8; j += 2) {
                float d[8];
                sixteen(d, block[8 * panel + j], block[8 * panel + j + 1]);
                finish<kFinish>(d, fragment(out, 8 * j), fragment(activation, 8 * j), bias[j],
                                bias[j + 1]);
            }
            end(first);
        }
    }

    // Stores the results as fp32, in units of half as many columns. Those to which the results are
    // added lie there already.
    __device__ __forceinline__ void store_partial(const ProductPlace& place) {
        constexpr int kCols = kUnitCols / 2;
        const int row = warp_row() + lane_index() / 4, pair = lane_index() % 4 * 2;
#pragma unroll
        for (int i = 0; i < C::kBlocks; ++i) {
            if (!has_block(place, i)) break;
#pragma unroll
            for (int panel = 0; panel < C::kN / kCols; ++panel) {
                if (place.n + kCols * panel >= p.n) break;
                const int first = begin();
                const auto unit = Shared::unit(consumer, first);
#pragma unroll
                for (int j = 0; j < kCols / 8; ++j) {
                    const float(&d)[4] = acc[i][kCols / 8 * panel + j];
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        // A column of fp32 takes two columns of 16 bits.
                        T* to = unit.at(row + 8 * half, 2 * (8 * j + pair));
                        float2 sum = make_float2(d[2 * half], d[2 * half + 1]);
                        if (kLayout == Layout::backward && p.has_h) {
                            const float2 before = *reinterpret_cast<const float2*>(to);
                            sum.x += before.x;
                            sum.y += before.y;
                        }
                        *reinterpret_cast<float2*>(to) = sum;
                    }
                }
                end(first);
            }
        }
    }
};

template <class T, class C, Layout kLayout>
__global__ void __launch_bounds__(C::kThreads, 1)
    product_sm90_kernel(const __grid_constant__ ProductSm90 p) {
    run_product<T, C, kLayout, true, ProductConsumer<T, C, kLayout>>(p);
}

}  // namespace gk
