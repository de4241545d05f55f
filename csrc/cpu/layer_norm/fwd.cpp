// LayerNorm forward: the rows first ... last - 1, kTogether at a time. The first pass over a row
// adds, writes s and takes the statistics, the second writes y from what is still in the cache.
// Each pass runs over all rows of a block before the next one: a row's last sums and its square
// root, each of which waits for the one before, are computed beside the next row's pass.
#include "cpu/kernels.h"
#include "cpu/layer_norm/moments.h"
#include "cpu/philox.h"

namespace gk::cpu::GK_ISA {
namespace {

constexpr int kTogether = 4;

// The numbers j0 ... j0 + n - 1 of a row of the residual. It is widened where R is not its dtype.
template <class R>
const R* block_of(const LayerNormFwd& p, int64_t i, int64_t j0, int64_t n, float* room) {
    const int64_t at = i * p.residual_stride + j0;
    if constexpr (__is_same(R, float)) {
        if (p.residual_dtype != DType::float32) {
            widen(p.residual_dtype, static_cast<const bf16*>(p.residual) + at, room, n);
            return room;
        }
    }
    return static_cast<const R*>(p.residual) + at;
}

// s = dropout(x) + residual, of row i. Returns the statistics of the row, as s holds it.
template <class X, class R, class S, bool kResidual, bool kDropout>
Moments add(const LayerNormFwd& p, int64_t i, S* s, ElementMask* mask) {
    constexpr int kBlock = ElementMask::kBlock;
    const X* x = static_cast<const X*>(p.x) + i * p.x_stride;
    float room[kBlock];
    Statistics statistics;
    for (int64_t j0 = 0; j0 < p.cols; j0 += kBlock) {
        const int64_t end = p.cols - j0 < kBlock ? p.cols : j0 + kBlock;
        const R* residual = kResidual ? block_of<R>(p, i, j0, end - j0, room) : nullptr;
        if (kDropout) mask->fill(i * p.cols + j0, static_cast<int>(end - j0));
        statistics.take(j0, end, [&](int64_t j, auto n) {
            Floats one = load_at(x + j, n);
            if (kDropout) one = mask->drop(one, j - j0);
            if (kResidual) one += load_at(residual + (j - j0), n);
            store_at(s + j, one, n);
            return rounded(one, s);
        });
    }
    return statistics.moments();
}

template <class S>
Moments moments_of(const S* s, int64_t cols) {
    Statistics statistics;
    statistics.take(0, cols, [&](int64_t j, auto n) { return load_at(s + j, n); });
    return statistics.moments();
}

template <class S, class Y>
void normalise(const S* s, float mean, float rstd, const float* weight, const float* bias, Y* y,
               int64_t cols) {
    for_vectors(0, cols, [&](int64_t j, auto n) {
        const Floats x = (load_at(s + j, n) - mean) * rstd, w = load_at(weight + j, n);
        store_at(y + j, bias == nullptr ? x * w : multiply_add(x, w, load_at(bias + j, n)), n);
    });
}

// Statistics and y of the rows i ... i + count - 1, which are at s.
template <class S, class Y>
void finish(const LayerNormFwd& p, const float* weight, const float* bias, const S* s,
            int64_t stride, const Moments* moments, int64_t i, int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
        const float mean = moments[r].mean;
        const float rstd = 1 / __builtin_sqrtf(moments[r].variance + p.eps);
        if (p.mean != nullptr) {
            p.mean[i + r] = mean;
            p.rstd[i + r] = rstd;
        }
        normalise(s + r * stride, mean, rstd, weight, bias,
                  static_cast<Y*>(p.y) + (i + r) * p.cols, p.cols);
    }
}

template <class X, class R, class S, bool kResidual, bool kDropout>
void rows(const LayerNormFwd& p, const float* weight, const float* bias, int64_t first,
          int64_t last) {
    ElementMask mask(p.dropout);
    for (int64_t i = first; i < last; i += kTogether) {
        const int64_t count = last - i < kTogether ? last - i : kTogether;
        S* s = static_cast<S*>(p.sum) + i * p.cols;
        Moments moments[kTogether];
        for (int64_t r = 0; r < count; ++r)
            moments[r] = add<X, R, S, kResidual, kDropout>(p, i + r, s + r * p.cols, &mask);
        finish<S, X>(p, weight, bias, s, p.cols, moments, i, count);
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
        Moments moments[kTogether];
        for (int64_t r = 0; r < count; ++r) moments[r] = moments_of(x + r * p.x_stride, p.cols);
        finish<X, X>(p, weight, bias, x, p.x_stride, moments, i, count);
    }
}

// The sum's dtype is that of x, or fp32; an fp32 residual makes it fp32. R is float for a residual
// of any other dtype than x's: each mixture that is compiled takes seconds.
template <class X>
void rows_of(const LayerNormFwd& p, const float* weight, const float* bias, int64_t first,
             int64_t last) {
    if (p.sum == nullptr) return plain_rows<X>(p, weight, bias, first, last);
    if (p.sum_dtype == DType::float32)
        rows<X, float, float>(p, weight, bias, first, last);
    else if (p.residual_dtype == p.x_dtype)
        rows<X, X, X>(p, weight, bias, first, last);
    else
        rows<X, float, X>(p, weight, bias, first, last);
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
