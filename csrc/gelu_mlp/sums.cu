// Sums over rows in a fixed order: db1, db2, and the splits of dw1 and dw2.
//
//     column sums    x (rows, cols) -> partial (blocks of 128 rows, cols), fp32
//     partial sums   partial (parts, cols) fp32 -> out (cols,), rounded
//
// Each kernel reads its input once; the first writes 1/128 as many elements, in fp32. db1's partial
// sums come from the product that computes dh (gelu_mlp/products.cu), one for each tile of rows.
#include "runtime/launch.h"

#include <cstdint>

#include "device/vector.h"
#include "gelu_mlp/params.h"

namespace gk {
namespace {

constexpr int kSumThreads = 256;

// Each lane sums 8 neighbouring columns, and each warp takes every eighth row of the block.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    column_sums_kernel(const __grid_constant__ ColumnSums p) {
    constexpr int kWarps = kSumThreads / 32, kCols = 32 * 8;
    const unsigned blocks = static_cast<unsigned>((p.cols + kCols - 1) / kCols);
    const int64_t part = blockIdx.x / blocks;
    const int64_t first_col = static_cast<int64_t>(blockIdx.x % blocks) * kCols;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int64_t col = first_col + 8 * lane;
    const int valid = static_cast<int>(min(p.cols - col, static_cast<int64_t>(8)));
    const bool aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.stride % kPer128<T> == 0;
    const int64_t first = part * kColumnSumRows;
    const int rows = static_cast<int>(min(p.rows - first, static_cast<int64_t>(kColumnSumRows)));

    float sums[8] = {};
    for (int row = warp; row < rows && valid > 0; row += kWarps) {
        const T* from = static_cast<const T*>(p.x) + (first + row) * p.stride + col;
        float values[8];
        unpack_floats(values, load_valid<8>(from, valid, aligned));
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[i] += values[i];
    }
    float* scratch = reinterpret_cast<float*>(shared_memory());  // (kWarps, kCols)
#pragma unroll
    for (int i = 0; i < 8; ++i) scratch[warp * kCols + 8 * lane + i] = sums[i];
    __syncthreads();
    const int64_t mine = first_col + threadIdx.x;
    if (mine < p.cols) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) sum += scratch[i * kCols + threadIdx.x];
        p.partial[part * p.cols + mine] = sum;
    }
}

// A CTA's threads form `teams` teams: each team sums its share of the parts for the same columns.
struct PartialSumsKernel {
    PartialSums p;
    int teams;
};

template <class T>
__global__ void __launch_bounds__(kSumThreads)
    partial_sums_kernel(const __grid_constant__ PartialSumsKernel kernel) {
    const PartialSums& p = kernel.p;
    const int width = kSumThreads / kernel.teams;
    const int team = static_cast<int>(threadIdx.x) / width;
    const int place = static_cast<int>(threadIdx.x) % width;
    const int64_t col = static_cast<int64_t>(blockIdx.x) * width + place;
    float sum = 0.0f;
    if (col < p.cols) {
#pragma unroll 4
        for (int part = team; part < p.parts; part += kernel.teams) {
            sum += p.partial[part * p.cols + col];
        }
    }
    float* scratch = reinterpret_cast<float*>(shared_memory());  // (teams, width)
    scratch[threadIdx.x] = sum;
    __syncthreads();
    if (team == 0 && col < p.cols) {
        for (int i = 1; i < kernel.teams; ++i) sum += scratch[i * width + place];
        static_cast<T*>(p.out)[col] = from_float<T>(sum);
    }
}

}  // namespace

void launch_column_sums(DType dtype, const ColumnSums& sums, Stream stream) {
    const int64_t ctas = column_sum_parts(sums.rows) * divide_up(sums.cols, 32 * 8);
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        launch(column_sums_kernel<T>,
               {"gelu_mlp column sums", shape_of(sums.rows, sums.cols) + " " + name_of(dtype),
                dim3(static_cast<unsigned>(ctas)), kSumThreads, 8 * 32 * 8 * sizeof(float), stream},
               sums);
    });
}

void launch_partial_sums(DType dtype, const PartialSums& sums, Stream stream) {
    // Many parts and few columns (db1, db2) take more threads a column; few parts (dw1, dw2) take
    // one.
    const int teams = sums.parts >= 16 ? 8 : 1;
    const int64_t ctas = divide_up(sums.cols, kSumThreads / teams);
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        launch(partial_sums_kernel<T>,
               {"gelu_mlp partial sums", shape_of(sums.parts, sums.cols) + " fp32",
                dim3(static_cast<unsigned>(ctas)), kSumThreads, kSumThreads * sizeof(float),
                stream},
               {sums, teams});
    });
}

}  // namespace gk
