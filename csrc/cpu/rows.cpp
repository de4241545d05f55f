// What the launchers need of vectors: conversions of a row, and sums of partial sums.
#include "cpu/kernels.h"
#include "cpu/vec.h"

namespace gk::cpu::GK_ISA {
namespace {

template <class From, class To>
void convert(const void* from, void* to, int64_t n) {
    for_vectors(0, n, [&](int64_t i, auto m) {
        store_at(static_cast<To*>(to) + i, load_at(static_cast<const From*>(from) + i, m), m);
    });
}

}  // namespace

void widen(DType dtype, const void* from, float* to, int64_t n) {
    switch (dtype) {
        case DType::float32: return convert<float, float>(from, to, n);
        case DType::bfloat16: return convert<bf16, float>(from, to, n);
        case DType::float16: return convert<fp16, float>(from, to, n);
    }
}

void round(DType dtype, const float* from, void* to, int64_t n) {
    switch (dtype) {
        case DType::float32: return convert<float, float>(from, to, n);
        case DType::bfloat16: return convert<float, bf16>(from, to, n);
        case DType::float16: return convert<float, fp16>(from, to, n);
    }
}

void add_rows(float* rows, int64_t parts, int64_t stride, int64_t first, int64_t last) {
    for_vectors(first, last, [&](int64_t j, auto n) {
        Floats sum = load_at(rows + j, n);
        for (int64_t part = 1; part < parts; ++part) sum += load_at(rows + part * stride + j, n);
        store_at(rows + j, sum, n);
    });
}

}  // namespace gk::cpu::GK_ISA
