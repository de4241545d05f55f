// The GELU MLP's products and sums: parameters and launchers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/build.h"
#include "runtime/launch.h"

namespace gk {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline const char* name_of(DType dtype) {
    return dtype == DType::f32 ? "fp32" : dtype == DType::bf16 ? "bf16" : "fp16";
}

inline std::string shape_of(int64_t rows, int64_t cols) {
    return "(" + std::to_string(rows) + ", " + std::to_string(cols) + ")";
}

// How a product D (m, n) = A B reads its operands; the last dimension is contiguous.
enum class Layout : int {
    forward = 0,   // A (m, k), B^T (n, k): x w1^T, a w2^T
    backward = 1,  // A (m, k), B (k, n):   dy w2, dh w1
    weight = 2,    // A^T (k, m), B (k, n): dy^T a, dh^T x
};

// Any size but 0. Pointers are to elements of one dtype, where nothing else is said.
struct Product {
    const void* a;      // (m, k) or (k, m), rows a_stride elements apart
    const void* b;      // (n, k) or (k, n), rows b_stride elements apart
    const void* bias;   // (n,) or absent; forward
    const void* h;      // (m, n), the pre-activation, or absent; backward, which multiplies by its
                        // gelu'
    void* out;          // (m, n): the product, with bias; dh; forward: may be absent
    void* activation;   // (m, n) or absent: gelu of h, forward: of the rounded `out`
    float* partial;     // absent, or `product_partials` rows; backward: of n, column sums of dh
                        // before rounding; weight: of m * n, to be summed, in place of `out`
    int64_t m, n, k;
    int64_t a_stride, b_stride;
    int splits;         // of k; weight only
    bool tanh;          // GELU's approximation
};

// Which kernel makes a product, and what its workspace follows from.
struct ProductChoice {
    int build;  // of gelu_mlp_builds(), kernels for Hopper; -1: the one for any device, mlp.cu's
    int tile_rows;  // partial column sums: ceil(m / tile_rows) rows
    int splits;
};

// `build`: -1 for the rule's choice. The plan asks for everything of the product but `partial`
// and `splits`; the launch, for which these follow from it, makes the same plan again. Both throw
// Error with the reason where a build cannot make the product.
ProductChoice choose_product(DType dtype, Layout layout, const Product& product, int build,
                         int device);
void launch_product(DType dtype, Layout layout, const Product& product, int build,
                    Stream stream);

// Rows of `partial`; weight: 1 says that k is not split, and that the product goes to `out`.
int64_t product_partials(DType dtype, Layout layout, const Product& product, int build,
                         Stream stream);

// mlp.cu: the kernel for any device.
ProductChoice choose_product_any(Layout layout, int64_t m, int64_t n, int64_t k, int device);
void launch_product_any(DType dtype, Layout layout, const Product& product, int tile_rows,
                        Stream stream);

// The kernels for Hopper, and why none of them can make a product ("": they can).
std::vector<Build> gelu_mlp_builds();
std::string gelu_mlp_sm90_refuses(DType dtype, Layout layout, const Product& product);

// partial[i, c] = sum of x[r, c] over the rows r of block i.
struct ColumnSums {
    const void* x;   // (rows, cols), rows `stride` elements apart
    float* partial;  // (column_sum_parts(rows), cols)
    int64_t rows, cols, stride;
};
constexpr int kColumnSumRows = 128;
inline int64_t column_sum_parts(int64_t rows) { return ceil_div(rows, kColumnSumRows); }

void launch_column_sums(DType dtype, const ColumnSums& sums, Stream stream);

// out[c] = sum of partial[i, c] over i, always in the same order, rounded.
struct PartialSums {
    const float* partial;  // (parts, cols)
    void* out;             // (cols,)
    int parts;
    int64_t cols;
};

void launch_partial_sums(DType dtype, const PartialSums& sums, Stream stream);

}  // namespace gk
