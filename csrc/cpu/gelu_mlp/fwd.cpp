// GELU of the elements first ... last - 1.
#include "cpu/gelu_mlp/gelu.h"
#include "cpu/kernels.h"

namespace gk::cpu::GK_ISA {
namespace {

template <class T, bool kTanh>
void elements(const GeluFwd& p, int64_t first, int64_t last) {
    const T* h = static_cast<const T*>(p.h);
    T* a = static_cast<T*>(p.a);
    for_vectors(first, last, [&](int64_t i, auto n) {
        Floats slope;
        store_at(a + i, gelu<kTanh, false>(load_at(h + i, n), slope), n);
    });
}

}  // namespace

void gelu_fwd(const GeluFwd& p, int64_t first, int64_t last) {
    switch (p.dtype) {
        case DType::float32:
            return p.tanh ? elements<float, true>(p, first, last)
                          : elements<float, false>(p, first, last);
        case DType::bfloat16:
            return p.tanh ? elements<bf16, true>(p, first, last)
                          : elements<bf16, false>(p, first, last);
        case DType::float16:
            return p.tanh ? elements<fp16, true>(p, first, last)
                          : elements<fp16, false>(p, first, last);
    }
}

}  // namespace gk::cpu::GK_ISA
