// Attention backward's launcher, and the first kernel that it launches. Formulas:
// attention/bwd/kernel.h.
//
//     delta = sum_d dout * out - dlse                 (B, H, Tq) fp32
//
// With dropout too, sum_d dout * out equals sum_j p dp, which saves a pass over the keys. The
// kernel reads out and dout once. It clears the sum of dq where there is one, and the gradients of
// the tokens that belong to no sequence.
//
// After it, the keys kernel computes dk and dv. dq comes from the queries kernel (7 products in
// all, the same bits every time) or, in 16 bits, from atomics inside the keys kernel (5 products).
// by_query comes from the queries kernel too, and then so does dq.
// The kernels that are not deterministic are assumed to be faster: at D 128 each atomic of 4 bytes
// comes with 1,280 floating-point operations of a CTA, which at 300 TFLOP/s are some 0.9 TB/s of
// additions in the L2 cache, against 40% more products.
//
// On Hopper the kernels of attention/bwd/sm90/params.h run before these, where they take the
// problem.
#include "attention/bwd/delta.h"
#include "attention/bwd/sm90/params.h"

namespace gk {

constexpr int kSumRows = 32;  // dq_sum consists of tiles of 32 rows, or of 16

inline int64_t dq_sum_elements(const AttentionCall& c) {
    return int64_t{c.entries()} * c.H * query_blocks(c, kSumRows) * kSumRows * padded_width(c.D);
}

struct DeltaArguments {
    BwdArguments of;
    int64_t sum_chunks;  // dq_sum's length in chunks of 16 bytes
};

template <class T>
__global__ void __launch_bounds__(kDeltaThreads)
    attention_bwd_delta_kernel(const __grid_constant__ DeltaArguments arguments) {
    const BwdArguments& a = arguments.of;
    const AttentionBwd& p = a.p;
    const AttentionCall& call = p.call;
    // Neighbouring threads take rows in the order in which they lie in out.
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kDeltaThreads + threadIdx.x;
    for (int64_t chunk = thread; chunk < arguments.sum_chunks;
         chunk += static_cast<int64_t>(gridDim.x) * kDeltaThreads)
        st128(p.dq_sum + 4 * chunk, Pack<float, 4>{});
    const int64_t index = thread / kDeltaLanes;
    const int64_t h = index % call.H, token = index / call.H;
    const int64_t i = token % call.total_q, b = token / call.total_q;
    const bool exists = b < call.entries();
    const float delta = row_delta<T>(a, b, i, h, exists);
    if (exists && threadIdx.x % kDeltaLanes == 0) {
        const int64_t at = (b * call.H + h) * call.total_q + i;
        p.delta[at] = p.dlse == nullptr ? delta : delta - p.dlse[at];
    }
    if (!call.ragged()) return;
    const auto clear = [&](void* gradient, int heads, const int32_t* cu_seqlens, int total) {
        if (gradient != nullptr)
            fill_outside(static_cast<T*>(gradient), int64_t{heads} * call.D, cu_seqlens, call.batch,
                         total, T(0.0f), thread, static_cast<int64_t>(gridDim.x) * kDeltaThreads);
    };
    clear(p.dq, call.H, call.cu_seqlens_q, call.total_q);
    clear(p.dk, call.Hk, call.cu_seqlens_k, call.total_k);
    clear(p.dv, call.Hk, call.cu_seqlens_k, call.total_k);
}

// The arguments of the kernels after the first one. On Hopper these kernels do work only where a
// result is not finite, and then they do not sum dq by atomics.
template <class T>
BwdArguments arguments_of(const AttentionBwd& p) {
    BwdArguments a = bwd_arguments<T>(p);
    a.only_if = p.turns;
    if (p.turns != nullptr) a.p.dq_sum = nullptr;
    return a;
}

template <class T>
void launch_attention_bwd_delta(const BwdArguments& a, Stream stream) {
    const AttentionCall& c = a.p.call;
    const int64_t rows = static_cast<int64_t>(c.entries()) * c.total_q * c.H;
    constexpr int64_t kRows = kDeltaThreads / kDeltaLanes;
    DeltaArguments arguments{a, 0};
    if (a.p.dq_sum != nullptr) arguments.sum_chunks = dq_sum_elements(c) / 4;
    const std::string shape = shape_of(c);
    launch(attention_bwd_delta_kernel<T>,
           {"attention_bwd_delta_kernel", shape,
            grid_of("attention_bwd_delta_kernel", shape, divide_up(rows, kRows)), kDeltaThreads, 0,
            stream},
           arguments);
}

template <class T>
void launch_attention_bwd_of(DType dtype, const AttentionBwd& p, int build, Stream stream) {
    const BwdArguments a = arguments_of<T>(p);
    if (p.turns != nullptr)
        launch_attention_bwd_sm90(dtype, p, build, stream);
    else
        launch_attention_bwd_delta<T>(a, stream);
    if (kExact<T> || p.by_query != nullptr || (p.dq != nullptr && a.p.dq_sum == nullptr))
        launch_attention_bwd_queries<T>(a, stream);
    if (p.dk != nullptr || p.dv != nullptr) launch_attention_bwd_keys<T>(a, stream);
}

BwdWorkspaces attention_bwd_workspaces(DType dtype, const AttentionBwd& p, int build,
                                       Stream stream) {
    const AttentionCall& c = p.call;
    const bool exact = dtype == DType::f32;
    BwdWorkspaces sizes = attention_bwd_sm90_workspaces(dtype, p, build, stream);
    sizes.delta = int64_t{c.entries()} * c.H * c.total_q;
    sizes.total = exact ? sizes.delta : 0;
    const bool by_atomics = p.dq != nullptr && (p.dk != nullptr || p.dv != nullptr) && !exact &&
                            !p.deterministic && p.by_query == nullptr;
    if (sizes.turns == 0 && by_atomics) sizes.dq_sum = dq_sum_elements(c);
    return sizes;
}

void launch_attention_bwd(DType dtype, const AttentionBwd& p, int build, Stream stream) {
    dispatch(dtype, [&](auto zero) {
        launch_attention_bwd_of<decltype(zero)>(dtype, p, build, stream);
    });
}

}  // namespace gk
