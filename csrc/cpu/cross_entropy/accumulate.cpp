// The numbers first ... last - 1 of a part, added to the sum.
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace gk::cpu::GK_ISA {
namespace {

template <class T>
void numbers(const Accumulate& p, int64_t first, int64_t last) {
    const T* part = static_cast<const T*>(p.part);
    T* out = static_cast<T*>(p.out);
    for_vectors(first, last, [&](int64_t i, auto n) {
        Floats sum = load_at(part + i, n);
        if (!p.first) sum += load_at(p.sum + i, n);
        if (out != nullptr)
            store_at(out + i, sum, n);
        else
            store_at(p.sum + i, sum, n);
    });
}

}  // namespace

void accumulate(const Accumulate& p, int64_t first, int64_t last) {
    switch (p.dtype) {
        case DType::float32: return numbers<float>(p, first, last);
        case DType::bfloat16: return numbers<bf16>(p, first, last);
        case DType::float16: return numbers<fp16>(p, first, last);
    }
}

}  // namespace gk::cpu::GK_ISA
