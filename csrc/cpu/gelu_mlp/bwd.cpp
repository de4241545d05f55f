// GELU backward: the rows first ... last - 1, kTogether at a time, so that the sums for the bias,
// which lie in memory, are read and written once for all of them.
#include "cpu/gelu_mlp/gelu.h"
#include "cpu/kernels.h"

namespace gk::cpu::GK_ISA {
namespace {

constexpr int kTogether = 4;

template <class T, bool kTanh, int kRows>
void some_rows(const GeluBwd& p, float* db, int64_t row) {
    const int64_t at = row * p.cols;
    const T *h = static_cast<const T*>(p.h) + at, *da = static_cast<const T*>(p.da) + at;
    T *dh = static_cast<T*>(p.dh) + at, *a = static_cast<T*>(p.a);
    if (a != nullptr) a += at;
    for_vectors(0, p.cols, [&](int64_t j, auto n) {
        Floats sum{};
        for (int r = 0; r < kRows; ++r) {
            const int64_t i = r * p.cols + j;
            Floats slope;
            const Floats found = gelu<kTanh, true>(load_at(h + i, n), slope);
            slope *= load_at(da + i, n);
            store_at(dh + i, slope, n);
            if (a != nullptr) store_at(a + i, found, n);
            sum += slope;
        }
        if (db != nullptr) store_at(db + j, load_at(db + j, n) + sum, n);
    });
}

template <class T, bool kTanh>
void rows(const GeluBwd& p, float* db, int64_t first, int64_t last) {
    int64_t i = first;
    for (; i + kTogether <= last; i += kTogether) some_rows<T, kTanh, kTogether>(p, db, i);
    for (; i < last; ++i) some_rows<T, kTanh, 1>(p, db, i);
}

}  // namespace

void gelu_bwd(const GeluBwd& p, float* db, int64_t first, int64_t last) {
    switch (p.dtype) {
        case DType::float32:
            return p.tanh ? rows<float, true>(p, db, first, last)
                          : rows<float, false>(p, db, first, last);
        case DType::bfloat16:
            return p.tanh ? rows<bf16, true>(p, db, first, last)
                          : rows<bf16, false>(p, db, first, last);
        case DType::float16:
            return p.tanh ? rows<fp16, true>(p, db, first, last)
                          : rows<fp16, false>(p, db, first, last);
    }
}

}  // namespace gk::cpu::GK_ISA
