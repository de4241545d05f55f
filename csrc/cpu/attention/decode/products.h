// The two products of decoding, of a few rows and kWidth keys: each row of keys or values is loaded
// once for all of these rows. A row's sums are taken in the same order whatever rows are beside it.
#pragma once

#include "cpu/attention/decode/params.h"
#include "cpu/vec.h"

namespace gk::cpu::GK_ISA {
namespace {

// The rows that a product takes at once: as many as there are registers for.
#if defined(__AVX512F__)
constexpr int kTogether = 4;
#else
constexpr int kTogether = 2;
#endif

// How the D columns of a row lie in vectors. The last vector of a row that is no whole number of
// vectors holds its last kWidth columns: it shares some with the one before.
struct Columns {
    int64_t D, whole;  // whole: columns in whole vectors
    Words own;         // lanes of the last vector that the one before does not have

    explicit Columns(int64_t columns) : D(columns), whole(columns / kWidth * kWidth) {
        const int shared = static_cast<int>(D < kWidth || D == whole ? 0 : whole + kWidth - D);
        for (int i = 0; i < kWidth; ++i) own[i] = i < shared ? 0 : 0xffffffff;
    }
    bool rest() const { return whole < D; }
    template <class T>
    Floats load_rest(const T* row) const {
        return D < kWidth ? load(row, static_cast<int>(D)) : load(row + D - kWidth);
    }
    template <class T>
    void store_rest(T* row, Floats x) const {
        D < kWidth ? store(row, x, static_cast<int>(D)) : store(row + D - kWidth, x);
    }
    // The columns that are not in a whole vector, with zeros in the other lanes. Zeros of a query
    // alone would not do: an infinite key times 0 is not a number.
    template <class T>
    Floats load_own(const T* row) const {
        return as_floats(as_words(load_rest(row)) & own);
    }
};

// Rows of kWidth keys or values, of which one head's columns begin `head` further.
template <class T>
struct Tile {
    const T* const* rows;
    int64_t head;

    const T* operator[](int64_t i) const { return rows[i] + head; }
    void ask_for(int i, int64_t D) const {
        if (rows == nullptr) return;
        const char* at = reinterpret_cast<const char*>(rows[i] + head);
        const int64_t bytes = D * static_cast<int64_t>(sizeof(T));
        for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line);
    }
};

// s[r][i] = q[r].keys[i], not scaled, for kRows rows, whose queries lie decode_width(D) apart, and
// kWidth keys. The rows of `next` are asked for on the way, so that they are there for the next
// call: as many columns as these have.
template <int kRows, class T>
__attribute__((noinline)) void score(const Columns& columns, const float* q, Tile<T> keys,
                                     float* s, Tile<T> next) {
    constexpr int kFours = kWidth / 4;
    const int64_t width = decode_width(columns.D);
    Floats sums[kRows][kFours];
    for (int four = 0; four < kFours; ++four) {
        // With these four keys the sums below come out in the order of the keys.
        const T* k0 = keys[four];
        const T* k1 = keys[four + kFours];
        const T* k2 = keys[four + 2 * kFours];
        const T* k3 = keys[four + 3 * kFours];
        for (int i = four; i < kWidth; i += kFours) next.ask_for(i, columns.D);
        Floats of[kRows][4] = {};
        const auto add = [&](int64_t col, const Floats(&k)[4]) {
            for (int r = 0; r < kRows; ++r) {
                const Floats x = load(q + r * width + col);
                for (int i = 0; i < 4; ++i) of[r][i] = multiply_add(k[i], x, of[r][i]);
            }
        };
        for (int64_t col = 0; col < columns.whole; col += kWidth)
            add(col, {load(k0 + col), load(k1 + col), load(k2 + col), load(k3 + col)});
        if (columns.rest())
            add(columns.whole, {columns.load_own(k0), columns.load_own(k1), columns.load_own(k2),
                                columns.load_own(k3)});
        for (int r = 0; r < kRows; ++r)
            sums[r][four] = paired<kWidth / 4>(paired<kWidth / 2>(of[r][0], of[r][2]),
                                               paired<kWidth / 2>(of[r][1], of[r][3]));
    }
    for (int r = 0; r < kRows; ++r) {
        Floats(&row)[kFours] = sums[r];
        if constexpr (kFours == 4) {
            row[0] = paired<2>(row[0], row[2]);
            row[1] = paired<2>(row[1], row[3]);
        }
        if constexpr (kFours >= 2) row[0] = paired<1>(row[0], row[1]);
        store(s + r * kDecodeKeys, row[0]);
    }
}

// out[r][col ...] += sum_i weights[r][i] values[i][col ...] for kVectors vectors of columns.
template <int kRows, int kVectors, class Load>
static inline __attribute__((always_inline)) void add_columns(int64_t width, const float* weights,
                                                              int64_t count, float* out,
                                                              const Load& load_value) {
    Floats sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) sums[r][v] = load(out + r * width + v * kWidth);
    for (int64_t i = 0; i < count; ++i) {
        Floats weight[kRows];
        for (int r = 0; r < kRows; ++r) weight[r] = all(weights[r * kDecodeKeys + i]);
        for (int v = 0; v < kVectors; ++v) {
            const Floats value = load_value(i, v * kWidth);
            for (int r = 0; r < kRows; ++r)
                sums[r][v] = multiply_add(value, weight[r], sums[r][v]);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) store(out + r * width + v * kWidth, sums[r][v]);
}

// out[r] += sum_i weights[r][i] values[i] for kRows rows, whose results lie decode_width(D) apart.
template <int kRows, class T>
__attribute__((noinline)) void add_values(const Columns& columns, const float* weights,
                                          Tile<T> values, int64_t count, float* out,
                                          Tile<T> next) {
    constexpr int kVectors = 4;
    for (int i = 0; i < kWidth; ++i) next.ask_for(i, columns.D);
    const int64_t width = decode_width(columns.D);
    int64_t col = 0;
    const auto load_value = [&](int64_t i, int64_t further) {
        return load(values[i] + col + further);
    };
    for (; col + kVectors * kWidth <= columns.whole; col += kVectors * kWidth)
        add_columns<kRows, kVectors>(width, weights, count, out + col, load_value);
    for (; col < columns.whole; col += kWidth)
        add_columns<kRows, 1>(width, weights, count, out + col, load_value);
    if (columns.rest())
        add_columns<kRows, 1>(width, weights, count, out + col, [&](int64_t i, int64_t) {
            return columns.load_rest(values[i]);
        });
}

}  // namespace
}  // namespace gk::cpu::GK_ISA
