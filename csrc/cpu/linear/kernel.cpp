// The columns first ... last - 1 of y. A number of y is a sum over K in kWidth lanes, whose order is
// the same in every block, and then over the lanes.
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace gk::cpu::GK_ISA {
namespace {

constexpr int kBlock = 48;  // rows of w that stay in the cache while all rows of x meet them

// How many rows of w meet kRows rows of x at a time: sums that fill the registers, and at least
// eight, since each waits for the one before. AVX-512 has 32 registers, the others have 16.
constexpr bool kMany = kWidth == 16;
template <int kRows>
constexpr int kTogether = kRows == 1   ? 8
                          : kRows == 2 ? (kMany ? 8 : 5)
                          : kRows == 4 ? (kMany ? 6 : 3)
                                       : 3;

// Lane i gets the sum of the lanes of v[i], for 2 kHalf vectors; the other lanes repeat them.
template <int kHalf>
Floats sums_of_lanes(Floats* v) {
    for (int i = 0; i < kHalf; ++i) v[i] = paired<kHalf>(v[i], v[i + kHalf]);
    if constexpr (kHalf > 1) return sums_of_lanes<kHalf / 2>(v);
    return v[0];
}

// Rows of x meet up to kTogether rows of w, which has `there`. y: (kRows, kBlock).
template <class T, int kRows>
void meet(const T* w_rows, int64_t w_stride, int there, const float* x, int64_t x_stride, int64_t K,
          float* y) {
    constexpr int kOuts = kTogether<kRows>, kSums = kOuts * kRows;
    const T* w[kOuts];
    for (int o = 0; o < kOuts; ++o) w[o] = w_rows + (o < there ? o : 0) * w_stride;
    Floats sums[kSums] = {};
    for_vectors(0, K, [&](int64_t k, auto lanes) {
        Floats left[kOuts];
#pragma GCC unroll 8
        for (int o = 0; o < kOuts; ++o) {
            left[o] = load_at(w[o] + k, lanes);
            __builtin_prefetch(w[o] + kOuts * w_stride + k, 0, 2);  // what is read next
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            Floats right = load_at(x + i * x_stride + k, lanes);
            if (kOuts > 1) keep_in_register(right);
#pragma GCC unroll 8
            for (int o = 0; o < kOuts; ++o)
                sums[i * kOuts + o] = multiply_add(left[o], right, sums[i * kOuts + o]);
        }
    });
    constexpr int kAll = (kSums + kWidth - 1) / kWidth * kWidth;
    Floats kept[kAll] = {};  // in memory, where an index may vary
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) kept[i] = sums[i];
    float found[kAll];
    for (int i = 0; i < kAll; i += kWidth)
        store(found + i, sums_of_lanes<kWidth / 2>(kept + i));
    for (int i = 0; i < kRows; ++i)
        for (int o = 0; o < there; ++o) y[i * kBlock + o] = found[i * kOuts + o];
}

// Rows r ... r + kRows - 1 of x meet the rows n ... end - 1 of w.
template <class T, int kRows>
void meet_block(const Linear& p, const float* x, int64_t x_stride, int64_t r, int64_t n,
                int64_t end) {
    constexpr int kOuts = kTogether<kRows>;
    const T* w = static_cast<const T*>(p.w);
    const T* b = static_cast<const T*>(p.b);
    float sums[kRows * kBlock];
    for (int64_t m = n; m < end; m += kOuts)
        meet<T, kRows>(w + m * p.w_stride, p.w_stride,
                       static_cast<int>(end - m < kOuts ? end - m : kOuts), x + r * x_stride,
                       x_stride, p.K, sums + (m - n));
    for (int i = 0; i < kRows; ++i)
        for_vectors(0, end - n, [&](int64_t m, auto lanes) {
            Floats sum = load_at(sums + i * kBlock + m, lanes);
            if (b != nullptr) sum += load_at(b + n + m, lanes);
            store_at(static_cast<T*>(p.y) + (r + i) * p.N + n + m, sum, lanes);
        });
}

template <class T>
void columns(const Linear& p, const float* x, int64_t x_stride, int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n += kBlock) {
        const int64_t end = n + kBlock < last ? n + kBlock : last;
        int64_t r = 0;
        if constexpr (kMany)
            for (; r + 8 <= p.M; r += 8) meet_block<T, 8>(p, x, x_stride, r, n, end);
        for (; r + 4 <= p.M; r += 4) meet_block<T, 4>(p, x, x_stride, r, n, end);
        if (p.M & 2) meet_block<T, 2>(p, x, x_stride, r, n, end);
        r += p.M & 2;
        if (p.M & 1) meet_block<T, 1>(p, x, x_stride, r, n, end);
    }
}

}  // namespace

// x in fp32: its own rows, or (M, K).
int64_t linear_scratch(const Linear& p) { return p.dtype == DType::float32 ? 0 : p.M * p.K * 4; }

void linear_ready(const Linear& p, void* x) {
    if (p.dtype == DType::float32) return;
    for (int64_t r = 0; r < p.M; ++r)
        widen(p.dtype, static_cast<const bf16*>(p.x) + r * p.x_stride,
              static_cast<float*>(x) + r * p.K, p.K);
}

void linear(const Linear& p, const void* x, int64_t first, int64_t last) {
    const bool own = p.dtype == DType::float32;
    const float* rows = static_cast<const float*>(own ? p.x : x);
    const int64_t stride = own ? p.x_stride : p.K;
    if (p.transposed) return linear_transposed(p, rows, stride, first, last);
    switch (p.dtype) {
        case DType::float32:
            return columns<float>(p, rows, stride, first, last);
        case DType::bfloat16:
            return columns<bf16>(p, rows, stride, first, last);
        case DType::float16:
            return columns<fp16>(p, rows, stride, first, last);
    }
}

}  // namespace gk::cpu::GK_ISA
