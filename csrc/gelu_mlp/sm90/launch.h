// Launches the kernel of gelu_mlp/sm90/kernel.h: tensor maps, counts of tiles, the grid.
#pragma once

#include <algorithm>
#include <string>
#include <type_traits>

#include "gelu_mlp/sm90/kernel.h"

namespace gk {

// Row tiles that read the same columns of B run together, so that these columns stay in L2.
constexpr int kProductGroupRows = 2048;

template <class C, Layout kLayout>
ProductSm90 product_sm90(DType dtype, const Product& p) {
    const auto matrix = [&](const void* base, int64_t rows, int64_t cols, int64_t stride,
                            int box_rows) {
        return tensor_map({dtype, 2, base, {cols, rows}, {1, stride}, {kUnitCols, box_rows},
                           Swizzle::b128});
    };
    ProductSm90 kernel{};
    kernel.a = kLayout == Layout::weight ? matrix(p.a, p.k, p.m, p.a_stride, C::kK)
                                         : matrix(p.a, p.m, p.k, p.a_stride, C::kM);
    kernel.b = kLayout == Layout::forward
                   ? matrix(p.b, p.n, p.k, p.b_stride, C::kN / C::kCluster)
                   : matrix(p.b, p.k, p.n, p.b_stride, C::kK / C::kCluster);
    kernel.wide = p.splits > 1 || p.total != nullptr;
    if (kernel.wide) {
        const float* base = p.splits > 1 ? p.partial : p.total;
        kernel.out = tensor_map({DType::f32, 3, base, {p.n, p.m, p.splits}, {1, p.n, p.m * p.n},
                                 {kUnitCols / 2, kUnitRows, 1}, Swizzle::b128});
    } else if (p.out != nullptr) {
        kernel.out = matrix(p.out, p.m, p.n, p.n, kUnitRows);
    }
    if (p.activation != nullptr) kernel.activation = matrix(p.activation, p.m, p.n, p.n, kUnitRows);
    if (p.h != nullptr) kernel.h = matrix(p.h, p.m, p.n, p.n, kUnitRows);
    if (p.addend != nullptr) {
        kernel.h = tensor_map({DType::f32, 2, p.addend, {p.n, p.m}, {1, p.n},
                               {kUnitCols / 2, kUnitRows}, Swizzle::b128});
    }
    kernel.bias = p.bias;
    kernel.partial = kLayout == Layout::backward ? p.partial : nullptr;
    kernel.m = p.m;
    kernel.n = p.n;
    kernel.steps = static_cast<unsigned>(divide_up(p.k, C::kK));
    kernel.splits = static_cast<unsigned>(p.splits);
    kernel.tiles_m = static_cast<unsigned>(divide_up(p.m, C::kM * C::kCluster));
    kernel.tiles_n = static_cast<unsigned>(divide_up(p.n, C::kN));
    kernel.group = std::min(kernel.tiles_m,
                            static_cast<unsigned>(kProductGroupRows / (C::kM * C::kCluster)));
    kernel.items = kernel.tiles_m * kernel.tiles_n * kernel.splits;
    kernel.has_out = p.out != nullptr || kernel.wide;
    kernel.has_activation = p.activation != nullptr;
    kernel.has_h = p.h != nullptr || p.addend != nullptr;
    kernel.tanh = p.tanh;
    return kernel;
}

// How a kernel of build kNumber is launched: one cluster for each place on the chip.
template <int kNumber>
Launch product_launch(const char* name, const std::string& shape, const ProductSm90& kernel,
                      double clocks, const Stream& stream) {
    using C = ProductBuild<kNumber>;
    const unsigned clusters =
        std::min(kernel.items, std::max(1u, static_cast<unsigned>(multiprocessors(stream.device)) /
                                                C::kCluster));
    return {.name = name,
            .shape = shape,
            .grid = dim3(clusters * C::kCluster),
            .threads = C::kThreads,
            .shared_bytes = C::kSharedBytes,
            .stream = stream,
            .cluster = C::kCluster,
            .tiles = int64_t{kernel.items} * C::kCluster,
            .built = kProductBuilds[kNumber],
            .clocks = clocks};
}

template <class T, int kNumber, Layout kLayout>
void launch_product_build(DType dtype, const Product& p, double clocks, const Stream& stream) {
    using C = ProductBuild<kNumber>;
    constexpr const char* kNames[] = {"gelu_mlp product for sm90, forward",
                                      "gelu_mlp product for sm90, backward",
                                      "gelu_mlp product for sm90, weight gradient"};
    const ProductSm90 kernel = product_sm90<C, kLayout>(dtype, p);
    launch(product_sm90_kernel<T, C, kLayout>,
           product_launch<kNumber>(kNames[static_cast<int>(kLayout)],
                                   shape_of(p) + " " + name_of(dtype), kernel, clocks, stream),
           kernel);
}

template <Layout kLayout>
void launch_product_sm90(DType dtype, const Product& p, const ProductChoice& choice,
                         Stream stream) {
    with_number<kProductCount>(choice.build, [&](auto number) {
        if (dtype == DType::bf16)
            return launch_product_build<__nv_bfloat16, number, kLayout>(dtype, p, choice.clocks,
                                                                        stream);
        if constexpr (is_compiled(kProductRows[number].rule, DType::f16, false))
            launch_product_build<__half, number, kLayout>(dtype, p, choice.clocks, stream);
    });
}

}  // namespace gk
