// The GELU MLP's products and sums: parameters and launchers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/build.h"
#include "runtime/launch.h"
#include "runtime/shape.h"

namespace gk {

// How a product D (m, n) = A B reads its operands; the last dimension is contiguous.
enum class Layout : int {
    forward = 0,   // A (m, k), B^T (n, k): x w1^T, a w2^T
    backward = 1,  // A (m, k), B (k, n):   dy w2, dh w1
    weight = 2,    // A^T (k, m), B (k, n): dy^T a, dh^T x
};

// No size is 0. Pointers lead to elements of the product's dtype, unless their comment says
// otherwise.
struct Product {
    const void* a;      // (m, k) or (k, m), rows a_stride elements apart
    const void* b;      // (n, k) or (k, n), rows b_stride elements apart
    const void* bias;   // (n,) or null; forward
    const void* h;      // (m, n), the pre-activation, or null; backward: the product is
                        // multiplied by gelu'(h)
    const float* addend; // (m, n) fp32 or null, with `total` alone: it is added to the product
    void* out;          // (m, n): the product, with bias; or dh; forward: may be null
    void* activation;   // (m, n) or null: gelu of h; forward: gelu of the rounded `out`
    float* partial;     // null, or `product_partials` rows. backward: rows of n, column sums of dh,
                        // which Hopper rounds before it adds them. weight: rows of m * n, one for
                        // each split, to be summed; nothing goes to `out`
    float* total;       // null, or (m, n) fp32: the product goes there and not to `out`; backward
                        // without h
    int64_t m, n, k;
    int64_t a_stride, b_stride;
    int splits;         // splits of k; weight only
    bool tanh;          // GELU's tanh approximation
};

// The shape of a product, for error messages.
inline std::string shape_of(const Product& p) {
    return shape_of(p.m, p.k) + " times " + shape_of(p.k, p.n);
}

// The builds of the kernel for Hopper, by number.
std::vector<Build> gelu_mlp_builds();

// Which kernel computes a product, and what the size of its workspace depends on.
struct ProductChoice {
    int build;      // a number; kAnyGpu: the kernel for any GPU, gelu_mlp/products.cu
    int tile_rows;  // `partial` has ceil(m / tile_rows) rows of column sums
    int splits;     // splits of k
    double clocks;  // predicted clocks of a multiprocessor; 0: nothing is predicted
};

// build: a number, or kRule. choose_product reads every member of the product but `partial` and
// `splits`, which the caller then sets as the choice says. launch_product chooses again and comes
// to the same choice. Both throw Error with the reason where a build cannot compute the product.
ProductChoice choose_product(DType dtype, Layout layout, const Product& product, int build,
                             int device);
void launch_product(DType dtype, Layout layout, const Product& product, int build, Stream stream);

// The number of rows of `partial`. In Layout::weight 1 means that k is not split and that the
// product goes to `out`.
int64_t product_partials(DType dtype, Layout layout, const Product& product, int build,
                         Stream stream);

// partial[i, c] = sum of x[r, c] over the rows r of block i.
struct ColumnSums {
    const void* x;   // (rows, cols), rows `stride` elements apart
    float* partial;  // (column_sum_parts(rows), cols)
    int64_t rows, cols, stride;
};
constexpr int kColumnSumRows = 128;
inline int64_t column_sum_parts(int64_t rows) { return divide_up(rows, kColumnSumRows); }

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
