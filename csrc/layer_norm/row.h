// How LayerNorm's kernels hold a row in groups of eight columns (layer_norm/shape.h). A team of
// neighbouring warps, or a cluster, shares the row; thread t of T holds groups t, t + T, t + 2T ...
#pragma once

#include <cmath>
#include <cstdint>

#include "device/philox.h"
#include "device/vector.h"
#include "layer_norm/shape.h"

namespace gk {

// Rounds as a division does, and is exact where the division is: the residual corrects the product
// with the inverse (P. Markstein, "Computation of elementary functions on the IBM RISC System/6000
// processor", 1990). An infinite `a` gives NaN.
__device__ __forceinline__ float divide(float a, const Divisor& by) {
    const float quotient = a * by.inverse;
    return fmaf(fmaf(-quotient, by.value, a), by.inverse, quotient);
}

// Loads a group of a row; columns past the end of the row are zero.
template <bool kAligned, class T>
__device__ __forceinline__ Pack<T, kGroup> load_group(const T* row, int col, int cols) {
    Pack<T, kGroup> pack;
    if (kAligned && col < cols) return load_pack<kGroup>(row + col);
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
        pack.at[j] = !kAligned && col + j < cols ? row[col + j] : from_float<T>(0.0f);
    return pack;
}

template <bool kAligned, class T>
__device__ __forceinline__ void store_group(T* row, int col, int cols,
                                            const Pack<T, kGroup>& pack) {
    if constexpr (kAligned) {
        if (col < cols) store_pack<kGroup>(row + col, pack);
    } else {
#pragma unroll
        for (int j = 0; j < kGroup; ++j)
            if (col + j < cols) row[col + j] = pack.at[j];
    }
}

// A group of a dtype that is known only at run time, as it lies in memory. The loads come first and
// the conversions later, so that many loads are in flight at once. kBytes: the size of the widest
// element that a group may hold.
template <int kBytes>
struct RawGroup {
    alignas(16) unsigned char bytes[kGroup * kBytes];

    template <class T>
    __device__ __forceinline__ Pack<T, kGroup>& as() {
        return *reinterpret_cast<Pack<T, kGroup>*>(bytes);
    }
};

template <bool kAligned, int kBytes>
__device__ __forceinline__ void load_raw(RawGroup<kBytes>& group, const void* matrix,
                                         int64_t row_start, DType dtype, int col, int cols) {
    // Both 16-bit dtypes are loaded as __half, since only bits are moved.
    if (kBytes == 4 && dtype == DType::f32)
        group.template as<float>() =
            load_group<kAligned>(static_cast<const float*>(matrix) + row_start, col, cols);
    else
        group.template as<__half>() =
            load_group<kAligned>(static_cast<const __half*>(matrix) + row_start, col, cols);
}

template <int kBytes>
__device__ __forceinline__ void unpack_raw(float (&values)[kGroup], RawGroup<kBytes>& group,
                                           DType dtype) {
    if (kBytes == 4 && dtype == DType::f32)
        unpack_floats(values, group.template as<float>());
    else if (dtype == DType::bf16)
        unpack_floats(values, group.template as<__nv_bfloat16>());
    else
        unpack_floats(values, group.template as<__half>());
}

template <bool kAligned>
__device__ __forceinline__ void load_floats(float (&values)[kGroup], const void* vector,
                                            DType dtype, int col, int cols) {
    RawGroup<4> group;
    load_raw<kAligned>(group, vector, 0, dtype, col, cols);
    unpack_raw(values, group, dtype);
}

template <bool kAligned>
__device__ __forceinline__ void store_floats(void* matrix, int64_t row_start, DType dtype, int col,
                                             int cols, const float (&values)[kGroup]) {
    if (dtype == DType::f32)
        store_group<kAligned>(static_cast<float*>(matrix) + row_start, col, cols,
                              pack_floats<float>(values));
    else if (dtype == DType::bf16)
        store_group<kAligned>(static_cast<__nv_bfloat16*>(matrix) + row_start, col, cols,
                              pack_floats<__nv_bfloat16>(values));
    else
        store_group<kAligned>(static_cast<__half*>(matrix) + row_start, col, cols,
                              pack_floats<__half>(values));
}

__device__ __forceinline__ void store_float(void* vector, DType dtype, int col, float value) {
    if (dtype == DType::f32)
        static_cast<float*>(vector)[col] = value;
    else if (dtype == DType::bf16)
        static_cast<__nv_bfloat16*>(vector)[col] = from_float<__nv_bfloat16>(value);
    else
        static_cast<__half*>(vector)[col] = from_float<__half>(value);
}

// The threads that share a row.
struct Team {
    int index;    // index of the team in the CTA
    int thread;   // index of the thread in the team
    int threads;  // threads of the team

    // A team of `warps` neighbouring warps of a CTA.
    __device__ explicit Team(int warps)
        : index(threadIdx.x / (32 * warps)),
          thread(threadIdx.x - index * 32 * warps),
          threads(32 * warps) {}
    // A team that is a cluster of `ctas` CTAs; this CTA has number `rank`.
    __device__ Team(int rank, int ctas)
        : index(0), thread(rank * blockDim.x + threadIdx.x), threads(ctas * blockDim.x) {}

    // The first column of the thread's group g.
    __device__ int col(int g) const { return (thread + g * threads) * kGroup; }
};

__device__ __forceinline__ float group_sum(const float (&v)[kGroup]) {
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

// The sum of the products, added up in the order of group_sum.
__device__ __forceinline__ float group_dot(const float (&v)[kGroup], const float (&w)[kGroup]) {
    float pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = fmaf(v[2 * i + 1], w[2 * i + 1], v[2 * i] * w[2 * i]);
    return (pairs[0] + pairs[1]) + (pairs[2] + pairs[3]);
}

// Dropout, or its gradient: kept values are scaled, and the others become zero whatever they are.
__device__ __forceinline__ void drop(float (&values)[kGroup], int64_t first_element,
                                     const DropoutKey& key, float scale) {
    const uint32_t keep = elementwise_keep8(first_element, key);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) values[j] = keep >> j & 1 ? values[j] * scale : 0.0f;
}

// Calls f(X{}, S{}) with the types of x and of the sum: x's own, or fp32.
template <class F>
void dispatch_sum(DType x_dtype, DType sum_dtype, F&& f) {
    dispatch(x_dtype, [&](auto x) {
        if (sum_dtype == DType::f32)
            f(x, float{});
        else
            f(x, x);
    });
}

}  // namespace gk
