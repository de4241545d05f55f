// The columns first ... last - 1 of y where w lies transposed. Some rows of w^T are read side by
// side, from left to right, and each number of y gets the sum of their products. So memory is read in
// order, and a sum over K is one over K / kDepth sums: long chains lose digits. A number's bits
// depend on nothing beside it.
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace gk::cpu::GK_ISA {
namespace {

// Rows of w^T: half of the registers. AVX-512 has 32, the others have 16.
constexpr int kDepth = kWidth == 16 ? 16 : 8;
constexpr int kSums = 8192;  // the numbers of y that wait in the nearest cache

// Adds the products of kRows rows of w^T, from row k on, to sums (M, count).
template <class T, int kRows>
void add(const Linear& p, const T* w, const float* x, int64_t x_stride, int64_t count,
         float* sums) {
    for_vectors(0, count, [&](int64_t n, auto lanes) {
        Floats left[kRows];
#pragma GCC unroll 16
        for (int j = 0; j < kRows; ++j) {
            left[j] = load_at(w + j * p.w_stride + n, lanes);
            keep_in_register(left[j]);
        }
        for (int64_t r = 0; r < p.M; ++r) {
            const float* right = x + r * x_stride;
            Floats sum = left[0] * all(right[0]);
#pragma GCC unroll 16
            for (int j = 1; j < kRows; ++j) sum = multiply_add(left[j], all(right[j]), sum);
            float* to = sums + r * count + n;
            store_at(to, load_at(to, lanes) + sum, lanes);
        }
    });
}

template <class T>
void columns(const Linear& p, const float* x, int64_t x_stride, int64_t first, int64_t last) {
    const int64_t most = kSums / p.M / kWidth * kWidth;
    float sums[kSums];
    for (int64_t n = first; n < last; n += most) {
        const int64_t count = last - n < most ? last - n : most;
        const T* w = static_cast<const T*>(p.w) + n;
        const T* b = static_cast<const T*>(p.b);
        for (int64_t i = 0; i < p.M * count; ++i) sums[i] = 0;
        int64_t k = 0;
        for (; k + kDepth <= p.K; k += kDepth)
            add<T, kDepth>(p, w + k * p.w_stride, x + k, x_stride, count, sums);
        for (; k < p.K; ++k) add<T, 1>(p, w + k * p.w_stride, x + k, x_stride, count, sums);
        for (int64_t r = 0; r < p.M; ++r)
            for_vectors(0, count, [&](int64_t m, auto lanes) {
                Floats sum = load_at(sums + r * count + m, lanes);
                if (b != nullptr) sum += load_at(b + n + m, lanes);
                store_at(static_cast<T*>(p.y) + r * p.N + n + m, sum, lanes);
            });
    }
}

}  // namespace

void linear_transposed(const Linear& p, const float* x, int64_t x_stride, int64_t first,
                       int64_t last) {
    switch (p.dtype) {
        case DType::float32:
            return columns<float>(p, x, x_stride, first, last);
        case DType::bfloat16:
            return columns<bf16>(p, x, x_stride, first, last);
        case DType::float16:
            return columns<fp16>(p, x, x_stride, first, last);
    }
}

}  // namespace gk::cpu::GK_ISA
