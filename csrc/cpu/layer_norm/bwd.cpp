// LayerNorm backward: the rows first ... last - 1, kTogether at a time, so that the sums for weight
// and bias, which lie in memory, are read and written once for all of them.
#include "cpu/kernels.h"
#include "cpu/philox.h"

namespace gk::cpu::GK_ISA {
namespace {

constexpr int kTogether = 4;

// The means of g = dy weight and of g x^ over a row, x^ = (s - mean) rstd.
struct Means {
    float g[kTogether], gx[kTogether];
};

// Rows i ... i + kRows - 1. dweight and dbias get their sums over the rows; or null.
template <class X, class S, int kRows, bool kSums>
Means means(const LayerNormBwd& p, const float* weight, float* dweight, float* dbias, int64_t i) {
    const X* dy = static_cast<const X*>(p.dy) + i * p.cols;
    const S* s = static_cast<const S*>(p.sum) + i * p.sum_stride;
    Floats g[kRows] = {}, gx[kRows] = {};
    for_vectors(0, p.cols, [&](int64_t j, auto n) {
        const Floats w = load_at(weight + j, n);
        Floats dw{}, db{};
        for (int r = 0; r < kRows; ++r) {
            const Floats upper = load_at(dy + r * p.cols + j, n);
            const Floats difference = load_at(s + r * p.sum_stride + j, n) - p.mean[i + r];
            const Floats product = upper * first_lanes(difference * p.rstd[i + r], n);
            g[r] = multiply_add(upper, w, g[r]);
            gx[r] = multiply_add(product, w, gx[r]);
            dw += product;
            db += upper;
        }
        if (!kSums) return;
        if (dweight != nullptr) store_at(dweight + j, load_at(dweight + j, n) + dw, n);
        if (dbias != nullptr) store_at(dbias + j, load_at(dbias + j, n) + db, n);
    });
    Means found;
    const float count = static_cast<float>(p.cols);
    for (int r = 0; r < kRows; ++r) {
        found.g[r] = sum_of_lanes(g[r]) / count;
        found.gx[r] = sum_of_lanes(gx[r]) / count;
    }
    return found;
}

// The gradients of row i: of s, which is also the residual's, and of x. R is the residual's dtype;
// or float, from which they are rounded to it: each mixture that is compiled takes seconds.
template <class X, class S, class R, bool kDropout>
void row(const LayerNormBwd& p, const float* weight, int64_t i, float mean_g, float mean_gx,
         ElementMask* mask) {
    const X* dy = static_cast<const X*>(p.dy) + i * p.cols;
    const S* s = static_cast<const S*>(p.sum) + i * p.sum_stride;
    const S* dsum = p.dsum == nullptr ? nullptr : static_cast<const S*>(p.dsum) + i * p.cols;
    X* dx = static_cast<X*>(p.dx) + i * p.cols;
    const float mean = p.mean[i], rstd = p.rstd[i];
    const bool rounding = __is_same(R, float) && p.residual_dtype != DType::float32;
    constexpr int kBlock = ElementMask::kBlock;
    float room[kBlock];
    for (int64_t j0 = 0; j0 < p.cols; j0 += kBlock) {
        const int64_t end = p.cols - j0 < kBlock ? p.cols : j0 + kBlock;
        R* dresidual = static_cast<R*>(p.dresidual);
        if (dresidual != nullptr)
            dresidual = rounding ? reinterpret_cast<R*>(room) : dresidual + i * p.cols + j0;
        if (kDropout) mask->fill(i * p.cols + j0, static_cast<int>(end - j0));
        for_vectors(j0, end, [&](int64_t j, auto n) {
            const Floats x = (load_at(s + j, n) - mean) * rstd;
            Floats ds = multiply_add(load_at(dy + j, n), load_at(weight + j, n), -mean_g);
            ds = multiply_add(x, -mean_gx, ds) * rstd;
            if (dsum != nullptr) ds += load_at(dsum + j, n);
            if (dresidual != nullptr) store_at(dresidual + (j - j0), ds, n);
            store_at(dx + j, kDropout ? mask->drop(ds, j - j0) : ds, n);
        });
        if (dresidual != nullptr && rounding)
            round(p.residual_dtype, room, static_cast<bf16*>(p.dresidual) + i * p.cols + j0,
                  end - j0);
    }
}

template <class X, class S, class R, int kRows>
void some_rows(const LayerNormBwd& p, const float* weight, float* dweight, float* dbias, int64_t i,
               ElementMask* mask) {
    const Means of = dweight != nullptr || dbias != nullptr
                         ? means<X, S, kRows, true>(p, weight, dweight, dbias, i)
                         : means<X, S, kRows, false>(p, weight, nullptr, nullptr, i);
    for (int r = 0; r < kRows; ++r)
        if (p.dropout.rng != nullptr)
            row<X, S, R, true>(p, weight, i + r, of.g[r], of.gx[r], mask);
        else
            row<X, S, R, false>(p, weight, i + r, of.g[r], of.gx[r], mask);
}

template <class X, class S, class R>
void rows(const LayerNormBwd& p, const float* weight, float* dweight, float* dbias, int64_t first,
          int64_t last) {
    ElementMask mask(p.dropout);
    int64_t i = first;
    for (; i + kTogether <= last; i += kTogether)
        some_rows<X, S, R, kTogether>(p, weight, dweight, dbias, i, &mask);
    for (; i < last; ++i) some_rows<X, S, R, 1>(p, weight, dweight, dbias, i, &mask);
}

template <class X>
void rows_of(const LayerNormBwd& p, const float* weight, float* dweight, float* dbias,
             int64_t first, int64_t last) {
    if (p.sum_dtype == DType::float32)
        rows<X, float, float>(p, weight, dweight, dbias, first, last);
    else if (p.residual_dtype == p.x_dtype)
        rows<X, X, X>(p, weight, dweight, dbias, first, last);
    else
        rows<X, X, float>(p, weight, dweight, dbias, first, last);
}

}  // namespace

void layer_norm_bwd(const LayerNormBwd& p, const float* weight, float* dweight, float* dbias,
                    int64_t first, int64_t last) {
    switch (p.x_dtype) {
        case DType::float32: return rows_of<float>(p, weight, dweight, dbias, first, last);
        case DType::bfloat16: return rows_of<bf16>(p, weight, dweight, dbias, first, last);
        case DType::float16: return rows_of<fp16>(p, weight, dweight, dbias, first, last);
    }
}

}  // namespace gk::cpu::GK_ISA
