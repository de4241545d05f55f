// Attention backward's launcher, and the kernel before the others. Formulas: attention_bwd.h.
//
//     delta = sum_d dout * out - dlse                 (B, H, Tq) fp32
//
// With dropout too, sum_d dout * out equals sum_j p dp, which saves a pass over the keys. Reads out
// and dout once, and clears the sum of dq where there is one. A row whose gradients are not finite
// shows in delta: with a softcap scores are finite whatever q holds, so q is looked at too.
//
// Then, for dk and dv, the keys kernel; for dq the queries kernel (7 products in all, the same bits
// every time) or, in 16 bits, atomics inside the keys kernel (5 products). Not deterministic is
// taken to be the faster: at D 128 each atomic of 4 bytes comes with 1,280 floating-point
// operations of a CTA, at 300 TFLOP/s some 0.9 TB/s of additions in the L2 cache, against 40% more
// products.
#include "launch.h"

#include "attention_bwd.h"

namespace gk {

constexpr int kDeltaThreads = 256, kDeltaLanes = 8;  // eight lanes for a row
constexpr int kSumRows = 32;                         // dq_sum comes in tiles of 32 rows, or 16

// Of a head in the kernels for a head width D.
inline int padded_width(int D) {
    return D <= 64 ? 64 : D <= 96 ? 96 : D <= 128 ? 128 : D <= 192 ? 192 : 256;
}

struct DeltaArguments {
    BwdArguments of;
    int64_t sum_chunks;  // dq_sum's length in chunks of 16 bytes
};

// Elements col ... of a row D wide, zeros past its end.
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

template <class T>
__global__ void __launch_bounds__(kDeltaThreads)
    attention_bwd_delta_kernel(const __grid_constant__ DeltaArguments arguments) {
    const BwdArguments& a = arguments.of;
    const AttentionBwd& p = a.p;
    const AttentionCall& call = p.call;
    const int D = call.D;
    // Rows in the order of out in memory.
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kDeltaThreads + threadIdx.x;
    for (int64_t chunk = thread; chunk < arguments.sum_chunks;
         chunk += static_cast<int64_t>(gridDim.x) * kDeltaThreads)
        st128(p.dq_sum + 4 * chunk, Pack<float, 4>{});
    const int64_t index = thread / kDeltaLanes;
    const bool exists = index < static_cast<int64_t>(call.batch) * call.Tq * call.H;
    const int64_t h = index % call.H, i = index / call.H % call.Tq, b = index / call.H / call.Tq;
    float delta = 0;
    bool finite = true;
    if (exists) {
        const T* out = static_cast<const T*>(p.out) + index * D;
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
            if (call.softcap == 0) continue;
            load_chunk(x, q, col, D, a.q_aligned);
#pragma unroll
            for (int k = 0; k < kPer128<T>; ++k) finite = finite && is_finite(x[k]);
        }
    }
    if (!finite) delta = NAN;
#pragma unroll
    for (int lanes = 1; lanes < kDeltaLanes; lanes *= 2)
        delta += __shfl_xor_sync(0xffffffffu, delta, lanes);
    if (exists && threadIdx.x % kDeltaLanes == 0) {
        const int64_t at = (b * call.H + h) * call.Tq + i;
        p.delta[at] = p.dlse == nullptr ? delta : delta - p.dlse[at];
    }
}

extern template void launch_attention_bwd_queries<float>(const BwdArguments&, Stream);
extern template void launch_attention_bwd_queries<__nv_bfloat16>(const BwdArguments&, Stream);
extern template void launch_attention_bwd_queries<__half>(const BwdArguments&, Stream);
extern template void launch_attention_bwd_keys<float>(const BwdArguments&, Stream);
extern template void launch_attention_bwd_keys<__nv_bfloat16>(const BwdArguments&, Stream);
extern template void launch_attention_bwd_keys<__half>(const BwdArguments&, Stream);

template <class T>
void launch_attention_bwd_of(const AttentionBwd& p, Stream stream) {
    const AttentionCall& c = p.call;
    const int64_t size = sizeof(T), rows = static_cast<int64_t>(c.batch) * c.Tq * c.H;
    const Strides out{static_cast<int64_t>(c.Tq) * c.H * c.D, static_cast<int64_t>(c.H) * c.D, c.D};
    const BwdArguments a{p,
                         aligned_16(p.q, size, p.q_strides),
                         aligned_16(p.k, size, p.k_strides),
                         aligned_16(p.v, size, p.v_strides),
                         aligned_16(p.dout, size, p.dout_strides),
                         aligned_16(p.out, size, out)};
    constexpr int64_t kRows = kDeltaThreads / kDeltaLanes;
    DeltaArguments arguments{a, 0};
    if (p.dq_sum != nullptr)
        arguments.sum_chunks = static_cast<int64_t>(c.batch) * c.H *
                               ((c.Tq + kSumRows - 1) / kSumRows) *
                               (kSumRows * padded_width(c.D) / 4);
    launch(attention_bwd_delta_kernel<T>,
           {"attention_bwd_delta_kernel", shape_of(c),
            grid_of("attention_bwd_delta_kernel", c, (rows + kRows - 1) / kRows), kDeltaThreads, 0,
            stream},
           arguments);
    if (kExact<T> || (p.dq != nullptr && p.dq_sum == nullptr))
        launch_attention_bwd_queries<T>(a, stream);
    if (p.dk != nullptr || p.dv != nullptr) launch_attention_bwd_keys<T>(a, stream);
}

void launch_attention_bwd(DType dtype, const AttentionBwd& p, Stream stream) {
    dispatch(dtype, [&](auto zero) { launch_attention_bwd_of<decltype(zero)>(p, stream); });
}

}  // namespace gk
