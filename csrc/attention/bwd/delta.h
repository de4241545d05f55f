// delta = sum_d dout * out of a row, as attention backward's first kernels compute it: formulas in
// attention/bwd/kernel.h. Eight lanes share a row. Reads out and dout once.
//
// If the gradients of a row are not finite, its delta has to show it. With a softcap scores are
// finite whatever q holds, and with sinks lse is finite though the row sees no key or all of its
// scores are -inf. So then q is checked too.
#pragma once

#include "attention/bwd/kernel.h"

namespace gk {

constexpr int kDeltaThreads = 256, kDeltaLanes = 8;

// Loads the elements of a row D wide from column col on; zeros past the row's end.
template <class T>
__device__ void load_chunk(float (&values)[kPer128<T>], const T* line, int col, int D,
                           bool aligned) {
    if (aligned && col + kPer128<T> <= D) {
        unpack_floats(values, ld128(line + col));
        return;
    }
#pragma unroll
    for (int k = 0; k < kPer128<T>; ++k) values[k] = col + k < D ? to_float(line[col + k]) : 0.0f;
}

// delta of row (b, i, h), the same for the eight neighbouring lanes that call this together; 0
// where the row does not exist.
template <class T>
__device__ __forceinline__ float row_delta(const BwdArguments& a, int64_t b, int64_t i, int64_t h,
                                           bool exists) {
    const AttentionBwd& p = a.p;
    const AttentionCall& call = p.call;
    const int D = call.D;
    float delta = 0;
    const bool checks_q = call.softcap != 0 || call.sinks != nullptr;
    bool finite = true;
    if (exists) {
        const T* out = static_cast<const T*>(p.out) + ((b * call.total_q + i) * call.H + h) * D;
        const T* dout = static_cast<const T*>(p.dout) + b * p.dout_strides.batch +
                        i * p.dout_strides.token + h * p.dout_strides.head;
        const T* q = static_cast<const T*>(p.q) + b * p.q_strides.batch + i * p.q_strides.token +
                     h * p.q_strides.head;
        for (int col = static_cast<int>(threadIdx.x) % kDeltaLanes * kPer128<T>; col < D;
             col += kDeltaLanes * kPer128<T>) {
            float x[kPer128<T>], y[kPer128<T>];
            load_chunk(x, out, col, D, a.out_aligned);
            load_chunk(y, dout, col, D, a.dout_aligned);
#pragma unroll
            for (int k = 0; k < kPer128<T>; ++k) delta = fmaf(x[k], y[k], delta);
            if (!checks_q) continue;
            load_chunk(x, q, col, D, a.q_aligned);
#pragma unroll
            for (int k = 0; k < kPer128<T>; ++k) finite = finite && is_finite(x[k]);
        }
    }
    if (!finite) delta = NAN;
#pragma unroll
    for (int lanes = 1; lanes < kDeltaLanes; lanes *= 2)
        delta += __shfl_xor_sync(0xffffffffu, delta, lanes);
    return delta;
}

}  // namespace gk
