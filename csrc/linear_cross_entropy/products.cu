// linear_cross_entropy's products for any GPU: logits, which become parts of losses or their own
// gradients as soon as a tile of them is computed.
//
//     x (N, C), weight (V, C), bias (V,), targets (N,) int64
//     forward    l = x weight^T + bias; of each row and tile: max l, sum exp(l - max), sum l, and
//                the target's l, all fp32
//     backward   l once more; dl (N, classes of a block), in x's dtype
//
// linear_cross_entropy/params.h has the formulas. The main loop is that of the GELU MLP's products
// (gelu_mlp/tile.h). Bytes beyond the products' own operands: forward 8 for each row and tile of
// classes, 12 with label smoothing; backward dl. Saved for the backward pass: x, weight, bias,
// targets and lse.
#include "gelu_mlp/tile.h"
#include "linear_cross_entropy/choice.h"
#include "linear_cross_entropy/row.h"

namespace gk {
namespace {

template <class Params>
struct LogitsKernel {
    ProductKernel product;
    Params p;
    bool out_aligned;  // whether dlogits' base and rows are aligned to 16 bytes
};

// The eight logits of a thread in one row of the tile, and their slopes behind a softcap.
template <class T, class C>
struct LogitRow {
    const TileOfD<C>& tile;
    bool capped;
    Softcap<T> softcap;
    float bias[8] = {};

    __device__ __forceinline__ LogitRow(const TileOfD<C>& tile, const Logits& p)
        : tile(tile), capped(p.softcap != 0.0f), softcap(p.softcap) {
        if (p.bias == nullptr) return;
        const T* from = static_cast<const T*>(p.bias) + tile.n + tile.col();
        unpack_floats(bias, load_valid<8>(from, tile.valid(), false));
    }

    __device__ __forceinline__ void load(float (&l)[8], float (&slope)[8], int row) const {
        tile.load(l, row);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            l[i] += bias[i];
            slope[i] = 1.0f;
        }
        if (!capped) return;
#pragma unroll
        for (int i = 0; i < 8; ++i) l[i] = softcap(l[i], slope[i]);
    }
};

template <class T, class C>
__global__ void __launch_bounds__(C::kThreads, C::kCtas)
    linear_cross_entropy_fwd_kernel(const __grid_constant__ LogitsKernel<LossPartials> kernel) {
    using Tile = TileOfD<C>;
    const LossPartials& p = kernel.p;
    const Tile tile = multiply_tile<T, C, Layout::forward>(kernel.product);
    const LogitRow<T, C> logits(tile, p.logits);
    const int64_t part = tile.n / C::kN * p.logits.rows + tile.m;
    const bool first = threadIdx.x % Tile::kGroups == 0;
    // All lanes of a warp take part in the sums, also where the tile's rows have ended.
    for (int row = Tile::first_row(); row < C::kM; row += Tile::kRowStep) {
        float l[8], slope[8];
        logits.load(l, slope, row);
        float highest = -INFINITY, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (i >= tile.valid()) l[i] = -INFINITY;
            highest = max(highest, l[i]);
        }
        highest = max_of_lanes<Tile::kGroups>(highest);
        const float shift = shift_of(highest);
        float exponential = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            exponential += exp_for<T>(l[i] - shift);
            if (i < tile.valid()) sum += l[i];
        }
        exponential = sum_of_lanes<Tile::kGroups>(exponential);
        if (p.sum != nullptr) sum = sum_of_lanes<Tile::kGroups>(sum);
        if (row >= tile.rows) continue;
        if (first) {
            p.highest[part + row] = highest;
            p.exponential[part + row] = exponential;
            if (p.sum != nullptr) p.sum[part + row] = sum;
        }
        const int64_t at = p.logits.targets[tile.m + row] - tile.n - Tile::col();
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (at == i && i < tile.valid()) p.at_target[tile.m + row] = l[i];
        }
    }
}

template <class T, class C>
__global__ void __launch_bounds__(C::kThreads, C::kCtas)
    linear_cross_entropy_bwd_kernel(const __grid_constant__ LogitsKernel<LogitGradients> kernel) {
    using Tile = TileOfD<C>;
    const LogitGradients& p = kernel.p;
    const Tile tile = multiply_tile<T, C, Layout::forward>(kernel.product);
    const LogitRow<T, C> logits(tile, p.logits);
    for (int row = Tile::first_row(); row < tile.rows && tile.valid() > 0; row += Tile::kRowStep) {
        const RowGradient<T> gradient(p, tile.m + row);
        const int64_t at = gradient.target - tile.n - Tile::col();
        float d[8], slope[8];
        logits.load(d, slope, row);
#pragma unroll
        for (int i = 0; i < 8; ++i) d[i] = gradient(d[i], slope[i], at == i);
        T* to = static_cast<T*>(p.dlogits) + (tile.m + row) * p.dlogits_stride + tile.n;
        store_valid<8>(to + Tile::col(), pack_floats<T>(d), tile.valid(), kernel.out_aligned);
    }
}

// ---- host

template <class C, class Params>
void launch_tiles(void (*function)(LogitsKernel<Params>), LogitsKernel<Params>& kernel,
                  const char* name, DType dtype, const ProductChoice& choice, Stream stream) {
    kernel.product.p = product_of(kernel.p.logits);
    const std::string shape = shape_of(kernel.p.logits) + " " + name_of(dtype);
    const int64_t ctas = divide_into_tiles<C>(kernel.product, dtype);
    launch(function,
           {.name = name,
            .shape = shape,
            .grid = grid_of(name, shape, ctas),
            .threads = C::kThreads,
            .shared_bytes = C::kSharedBytes,
            .stream = stream,
            .clocks = choice.clocks},
           kernel);
}

}  // namespace

void launch_partials_any(DType dtype, const LossPartials& p, const ProductChoice& choice,
                         Stream stream) {
    constexpr const char* kName = "linear_cross_entropy_fwd";
    LogitsKernel<LossPartials> kernel{.product = {}, .p = p, .out_aligned = false};
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        if (choice.tile_rows == Large<T>::kM)
            launch_tiles<Large<T>>(linear_cross_entropy_fwd_kernel<T, Large<T>>, kernel, kName,
                                   dtype, choice, stream);
        else
            launch_tiles<Small<T>>(linear_cross_entropy_fwd_kernel<T, Small<T>>, kernel, kName,
                                   dtype, choice, stream);
    });
}

void launch_dlogits_any(DType dtype, const LogitGradients& p, const ProductChoice& choice,
                        Stream stream) {
    constexpr const char* kName = "linear_cross_entropy_bwd";
    LogitsKernel<LogitGradients> kernel{.product = {}, .p = p, .out_aligned = false};
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        const int64_t row_bytes = p.dlogits_stride * static_cast<int64_t>(sizeof(T));
        kernel.out_aligned = aligned_16(p.dlogits, row_bytes);
        if (choice.tile_rows == Large<T>::kM)
            launch_tiles<Large<T>>(linear_cross_entropy_bwd_kernel<T, Large<T>>, kernel, kName,
                                   dtype, choice, stream);
        else
            launch_tiles<Small<T>>(linear_cross_entropy_bwd_kernel<T, Small<T>>, kernel, kName,
                                   dtype, choice, stream);
    });
}

}  // namespace gk
