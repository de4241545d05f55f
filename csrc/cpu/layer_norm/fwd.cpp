// LayerNorm forward: the rows first ... last - 1, kTogether at a time. A row's s is written first,
// and read again from the cache for the statistics and for y. Each of the three passes runs over all
// rows of a block before the next: a pass ends in a chain of additions of one row's lanes and a
// division, which the CPU does beside the next row's pass.
#include "cpu/kernels.h"
#include "cpu/philox.h"

namespace gk::cpu::GK_ISA {
namespace {

constexpr int kTogether = 4;

// s = dropout(x) + residual, of one row. Returns the sum of the row, as s holds it.
template <class X, class R, class S, bool kResidual, bool kDropout>
float add(const X* x, const R* residual, S* s, int64_t cols, int64_t element, ElementMask* mask) {
    constexpr int kBlock = ElementMask::kBlock;
    Floats sums[kSums] = {};
    for (int64_t j0 = 0; j0 < cols; j0 += kBlock) {
        const int64_t count = cols - j0 < kBlock ? cols - j0 : kBlock;
        if (kDropout) mask->fill(element + j0, static_cast<int>(count));
        for_vectors_summing(count, [&](int64_t j, auto n, int which) {
            Floats one = load_at(x + j0 + j, n);
            if (kDropout) one = mask->drop(one, j);
            if (kResidual) one += load_at(residual + j0 + j, n);
            store_at(s + j0 + j, one, n);
            sums[which] += first_lanes(rounded(one, s), n);
        });
    }
    return sum_of_all(sums);
}

template <class S>
float sum_of_row(const S* s, int64_t cols) {
    Floats sums[kSums] = {};
    for_vectors_summing(cols, [&](int64_t j, auto n, int which) {
        sums[which] += load_at(s + j, n);
    });
    return sum_of_all(sums);
}

struct Moments {
    float mean, rstd;
};

// The variance is that of the differences from the mean. The differences also have a sum, which is
// what the mean has lost by rounding.
template <class S>
Moments moments(const S* s, float sum, int64_t cols, float eps) {
    const float count = static_cast<float>(cols), mean = sum / count;
    Floats sums[kSums] = {}, squares[kSums] = {};
    for_vectors_summing(cols, [&](int64_t j, auto n, int which) {
        const Floats difference = first_lanes(load_at(s + j, n) - mean, n);
        sums[which] += difference;
        squares[which] = multiply_add(difference, difference, squares[which]);
    });
    const float lost = sum_of_all(sums) / count;
    const float variance = sum_of_all(squares) / count - lost * lost;
    return {mean + lost, 1 / __builtin_sqrtf((variance < 0 ? 0 : variance) + eps)};
}

template <class S, class Y>
void normalise(const S* s, const Moments& of, const float* weight, const float* bias, Y* y,
               int64_t cols) {
    for_vectors(0, cols, [&](int64_t j, auto n) {
        const Floats x = (load_at(s + j, n) - of.mean) * of.rstd, w = load_at(weight + j, n);
        store_at(y + j, bias == nullptr ? x * w : multiply_add(x, w, load_at(bias + j, n)), n);
    });
}

void keep(const LayerNormFwd& p, int64_t row, const Moments& of) {
    if (p.mean == nullptr) return;
    p.mean[row] = of.mean;
    p.rstd[row] = of.rstd;
}

// Statistics and y of the rows i ... i + count - 1, which are at s, and their sums.
template <class S, class Y>
void finish(const LayerNormFwd& p, const float* weight, const float* bias, const S* s,
            int64_t stride, const float* totals, int64_t i, int64_t count) {
    Moments of[kTogether];
    for (int64_t r = 0; r < count; ++r)
        of[r] = moments(s + r * stride, totals[r], p.cols, p.eps);
    for (int64_t r = 0; r < count; ++r) {
        keep(p, i + r, of[r]);
        normalise(s + r * stride, of[r], weight, bias, static_cast<Y*>(p.y) + (i + r) * p.cols,
                  p.cols);
    }
}

template <class X, class R, class S, bool kResidual, bool kDropout>
void rows(const LayerNormFwd& p, const float* weight, const float* bias, int64_t first,
          int64_t last) {
    const X* x = static_cast<const X*>(p.x);
    const R* residual = static_cast<const R*>(p.residual);
    ElementMask mask(p.dropout);
    for (int64_t i = first; i < last; i += kTogether) {
        const int64_t count = last - i < kTogether ? last - i : kTogether;
        S* s = static_cast<S*>(p.sum) + i * p.cols;
        float totals[kTogether];
        for (int64_t r = 0; r < count; ++r)
            totals[r] = add<X, R, S, kResidual, kDropout>(
                x + (i + r) * p.x_stride, residual + (i + r) * p.residual_stride, s + r * p.cols,
                p.cols, (i + r) * p.cols, &mask);
        finish<S, X>(p, weight, bias, s, p.cols, totals, i, count);
    }
}

template <class X, class R, class S>
void rows(const LayerNormFwd& p, const float* weight, const float* bias, int64_t first,
          int64_t last) {
    const bool dropping = p.dropout.rng != nullptr;
    if (p.residual == nullptr)
        dropping ? rows<X, R, S, false, true>(p, weight, bias, first, last)
                 : rows<X, R, S, false, false>(p, weight, bias, first, last);
    else
        dropping ? rows<X, R, S, true, true>(p, weight, bias, first, last)
                 : rows<X, R, S, true, false>(p, weight, bias, first, last);
}

// s is x itself.
template <class X>
void plain_rows(const LayerNormFwd& p, const float* weight, const float* bias, int64_t first,
                int64_t last) {
    for (int64_t i = first; i < last; i += kTogether) {
        const int64_t count = last - i < kTogether ? last - i : kTogether;
        const X* x = static_cast<const X*>(p.x) + i * p.x_stride;
        float totals[kTogether];
        for (int64_t r = 0; r < count; ++r) totals[r] = sum_of_row(x + r * p.x_stride, p.cols);
        finish<X, X>(p, weight, bias, x, p.x_stride, totals, i, count);
    }
}

// The sum's dtype is that of x, or fp32; an fp32 residual makes it fp32.
template <class X>
void rows_of(const LayerNormFwd& p, const float* weight, const float* bias, int64_t first,
             int64_t last) {
    if (p.sum == nullptr) return plain_rows<X>(p, weight, bias, first, last);
    if (p.residual_dtype == DType::float32)
        return rows<X, float, float>(p, weight, bias, first, last);
    const bool wide = p.sum_dtype == DType::float32;
    if (p.residual_dtype == DType::bfloat16)
        wide ? rows<X, bf16, float>(p, weight, bias, first, last)
             : rows<X, bf16, X>(p, weight, bias, first, last);
    else
        wide ? rows<X, fp16, float>(p, weight, bias, first, last)
             : rows<X, fp16, X>(p, weight, bias, first, last);
}

}  // namespace

void layer_norm_fwd(const LayerNormFwd& p, const float* weight, const float* bias, int64_t first,
                    int64_t last) {
    switch (p.x_dtype) {
        case DType::float32: return rows_of<float>(p, weight, bias, first, last);
        case DType::bfloat16: return rows_of<bf16>(p, weight, bias, first, last);
        case DType::float16: return rows_of<fp16>(p, weight, bias, first, last);
    }
}

}  // namespace gk::cpu::GK_ISA
