// Attention's products in fp32 vectors: for fp32, and for 16 bits where there are no matrix tiles.
// cpu/amx/product.h has the same functions in tiles of bf16.
//
// A product is C (m, n) = A (m, k) B (k, n), or is added to C. A number of A is broadcast at a
// time, so A may lie transposed; B and C are read in rows.
#pragma once

#include "cpu/attention/scores.h"

namespace gk::cpu::GK_ISA {

// Whether n rows of D numbers, `stride` apart, are finite. The sum of 0 times each number is NaN if
// one is not.
template <class T>
static bool all_finite(const T* from, int64_t stride, int n, int D) {
    Floats sum[4] = {};
    for (int i = 0; i < n; ++i) {
        const T* row = from + i * stride;
        int d = 0;
        for (; d + 4 * kWidth <= D; d += 4 * kWidth)
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j)
                sum[j] = multiply_add(load(row + d + j * kWidth), 0.0f, sum[j]);
        for_vectors(d, D, [&](int64_t at, auto m) {
            sum[0] = multiply_add(load_at(row + at, m), 0.0f, sum[0]);
        });
    }
    return !any_nonfinite(sum[0] + sum[1] + (sum[2] + sum[3]));
}

// The first n of kWidth lanes of from[d][kLanes], d < D, times `by`, as rows of D numbers: row i,
// the lane i, lies at to + i * stride. What is not `there` counts as 0.
template <class T>
static void store_columns(const float* from, Floats by, int n, int D, bool there, T* to,
                          int64_t stride) {
    for (int d = 0; d < D; d += kWidth) {
        Floats square[kWidth];
        for (int i = 0; i < kWidth; ++i)
            square[i] = there ? load(from + (d + i) * kLanes) * by : Floats{};
        transpose(square);
        for (int i = 0; i < n && i < kWidth; ++i) {
            if (d + kWidth <= D)
                store(to + i * stride + d, square[i]);
            else
                store(to + i * stride + d, square[i], D - d);
        }
    }
}

template <class T>
struct VectorProducts {
    using Element = T;
    using Number = float;                 // of an operand
    static constexpr int kWide = kWidth;  // a head's width is padded to a multiple of this
    static constexpr int kKeys = 128;     // of a block
    static constexpr int kQueries = 128;  // that meet a block of keys at a time, backward

    struct Session {};  // what a thread holds while it computes products

    // Operand A: number (i, j) is at[i * row + j * column].
    struct Left {
        const float* at;
        int64_t row, column;

        Left from(int i, int j) const { return {at + i * row + j * column, row, column}; }
    };
    // Operand B: number (i, j) is at[i * stride + j].
    struct Right {
        const float* at;
        int64_t stride;

        Right from(int i) const { return {at + i * stride, stride}; }
    };

    // How many rows of weights a product takes, and how much of a head's width.
    static int padded(int rows) { return rows; }
    static int deep(int D, int) { return D; }

    // A matrix (kKeys, kQueries) that put_left has filled.
    static Left left(const float* at) { return {at, kQueries, 1}; }

    // n rows of D numbers, `stride` apart, as A. room: (kKeys, width).
    static Left rows(const T* from, int64_t stride, int n, int D, int width, float* room) {
        if constexpr (__is_same(T, float)) return {from, stride, 1};
        copy(from, stride, n, D, width, nullptr, room);
        return {room, width, 1};
    }
    // Their transpose as A. Rows with a taint count as 0; taint may be null. Returns whether what
    // counts is finite.
    static bool transposed(const T* from, int64_t stride, int n, int D, int width,
                           const float* taint, float* room, Left& found) {
        if constexpr (__is_same(T, float))
            if (taint == nullptr) {
                found = {from, 1, stride};
                return all_finite(from, stride, n, D);
            }
        copy(from, stride, n, D, width, taint, room);
        found = {room, 1, width};
        return taint != nullptr || all_finite(room, width, n, D);
    }

    // The transpose of n <= kLanes rows as B, (width, kLanes): the others are 0. Rows with a taint
    // are NaN; taint may be null.
    static Right columns(const T* from, int64_t stride, int n, int D, int width,
                         const float* taint, float* room) {
        for (int v = 0; v < kVectors; ++v)
            for (int d = 0; d < width; d += kWidth) {
                Floats square[kWidth];
                for (int i = 0; i < kWidth; ++i) {
                    const int row = v * kWidth + i;
                    const T* at = from + row * stride + d;
                    square[i] = row >= n          ? Floats{}
                                : d + kWidth <= D ? load(at)
                                                  : load(at, D - d);
                    if (taint != nullptr) square[i] = square[i] + taint[row];
                }
                transpose(square);
                for (int i = 0; i < kWidth; ++i)
                    store(room + (d + i) * kLanes + v * kWidth, square[i]);
            }
        return {room, kLanes};
    }
    // n <= kLanes rows as B, (kLanes, width): those with a taint, and the others, are 0.
    static void right_rows(const T* from, int64_t stride, int n, int D, int width,
                           const float* taint, float* to) {
        copy(from, stride, n, D, width, taint, to);
        for (int64_t i = static_cast<int64_t>(n) * width; i < kLanes * width; ++i) to[i] = 0;
    }

    // Rows `row` and row + 1 of weights, one vector of their lanes, as B and as A.
    static void put_right(float* to, int row, int vector, Floats even, Floats odd) {
        store(to + row * kLanes + vector * kWidth, even);
        store(to + (row + 1) * kLanes + vector * kWidth, odd);
    }
    static void put_left(float* to, int row, int lane, Floats even, Floats odd) {
        store(to + row * kQueries + lane, even);
        store(to + (row + 1) * kQueries + lane, odd);
    }

    // Wide heads in parts of their width: one long chain of additions would lose more digits.
    template <bool kAdd>
    static void multiply(float* c, int64_t stride, const Left& a, const Right& b, int m, int n,
                         int k) {
        constexpr int kLongest = 128;
        multiply_part<kAdd>(c, stride, a, b, m, n, static_cast<int>(least_of(k, kLongest)));
        for (int i = kLongest; i < k; i += kLongest)
            multiply_part<true>(c, stride, a.from(0, i), b.from(i), m, n,
                                static_cast<int>(least_of(k - i, kLongest)));
    }

  private:
    template <bool kAdd>
    static void multiply_part(float* c, int64_t stride, const Left& a, const Right& b, int m,
                              int n, int k) {
        if (a.column == 1)
            multiply<kAdd, false>(c, stride, a.at, a.row, b, m, n, k);
        else
            multiply<kAdd, true>(c, stride, a.at, a.column, b, m, n, k);
    }

    static void copy(const T* from, int64_t stride, int n, int D, int width, const float* taint,
                     float* to) {
        for (int i = 0; i < n; ++i) {
            const bool clear = taint != nullptr && taint[i] != 0;
            for_vectors(0, D, [&](int64_t d, auto m) {
                const Floats x = load_at(from + i * stride + d, m);
                store_at(to + i * width + d, clear ? Floats{} : x, m);
            });
            for (int d = D; d < width; ++d) to[i * width + d] = 0;
        }
    }

    // kRows x kAcross vectors of C stay in registers. What is added to C is summed apart first: one
    // long chain of additions would lose more digits.
    template <bool kAdd, bool kTransposed, int kRows, int kAcross>
    static void block(float* c, int64_t stride, const float* a, int64_t a_stride, const Right& b,
                      int k) {
        Floats sum[kRows][kAcross];
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
            for (int j = 0; j < kAcross; ++j)
                sum[i][j] = Floats{};
        const float* there = b.at;
        for (int step = 0; step < k; ++step) {
            Floats row[kAcross];
#pragma GCC unroll 2
            for (int j = 0; j < kAcross; ++j) row[j] = load(there + j * kWidth);
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) {
                const Floats one = all(kTransposed ? a[i] : a[i * a_stride]);
#pragma GCC unroll 2
                for (int j = 0; j < kAcross; ++j) sum[i][j] = multiply_add(one, row[j], sum[i][j]);
            }
            there += b.stride;
            a += kTransposed ? a_stride : 1;
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
            for (int j = 0; j < kAcross; ++j) {
                float* to = c + i * stride + j * kWidth;
                store(to, kAdd ? load(to) + sum[i][j] : sum[i][j]);
            }
    }

    template <bool kAdd, bool kTransposed, int kAcross>
    static void panel(float* c, int64_t stride, const float* a, int64_t a_stride, const Right& b,
                      int m, int k) {
        constexpr int kMost = kWidth == 16 ? 8 : 4;
        const int64_t a_row = kTransposed ? 1 : a_stride;
        int i = 0;
        for (; i + kMost <= m; i += kMost)
            block<kAdd, kTransposed, kMost, kAcross>(c + i * stride, stride, a + i * a_row,
                                                     a_stride, b, k);
        for (; i + 2 <= m; i += 2)
            block<kAdd, kTransposed, 2, kAcross>(c + i * stride, stride, a + i * a_row, a_stride,
                                                 b, k);
        if (i < m)
            block<kAdd, kTransposed, 1, kAcross>(c + i * stride, stride, a + i * a_row, a_stride,
                                                 b, k);
    }

    // n is a multiple of kWidth.
    template <bool kAdd, bool kTransposed>
    static void multiply(float* c, int64_t stride, const float* a, int64_t a_stride,
                         const Right& b, int m, int n, int k) {
        int j = 0;
        for (; j + 2 * kWidth <= n; j += 2 * kWidth)
            panel<kAdd, kTransposed, 2>(c + j, stride, a, a_stride, {b.at + j, b.stride}, m, k);
        if (j < n)
            panel<kAdd, kTransposed, 1>(c + j, stride, a, a_stride, {b.at + j, b.stride}, m, k);
    }
};

// Calls body with the products for a dtype.
template <class Body>
static void with_products(DType dtype, Body&& body) {
    switch (dtype) {
        case DType::float32: return body(VectorProducts<float>());
        case DType::bfloat16: return body(VectorProducts<bf16>());
        case DType::float16: return body(VectorProducts<fp16>());
    }
}

// P::transposed, without the rows that hold a number that is not finite: 0 * NaN would reach those
// who do not see the row. Returns null where there is no such row; else taint, with NaN for each of
// them and 0 for the others.
template <class P>
static const float* transposed(const typename P::Element* from, int64_t stride, int n, int D,
                               int width, float* taint, typename P::Number* room,
                               typename P::Left& found) {
    if (P::transposed(from, stride, n, D, width, nullptr, room, found)) return nullptr;
    for (int i = 0; i < n; ++i)
        taint[i] = all_finite(from + i * stride, stride, 1, D) ? 0.0f : __builtin_nanf("");
    P::transposed(from, stride, n, D, width, taint, room, found);
    return taint;
}

}  // namespace gk::cpu::GK_ISA
