// Decoding's launcher, and the step that combines the splits of an entry's keys. The kernel that
// attends to the keys is in attention/decode/kernel.h.
//
//     m = max_s m_s      l = sum_s l_s exp2(m_s - m)      out = sum_s o_s exp2(m_s - m) / l
//
// A sink is added at the end, once. The sums go in the order of the splits. Reads D + 2 floats of
// each row of each split, which the L2 cache holds.
#include "attention/decode/split.h"
#include "attention/row_end.h"
#include "device/reduce.h"
#include "device/vector.h"

namespace gk {

namespace {

constexpr int kCombineWarps = 4, kCombineThreads = 32 * kCombineWarps;

struct CombineArguments {
    DecodeArguments a;
    int rows_of_block;
};

// Each CTA takes a row, and each of its warps takes every fourth split.
template <class T>
__global__ void __launch_bounds__(kCombineThreads)
    attention_decode_combine_kernel(const __grid_constant__ CombineArguments arguments) {
    const DecodeArguments& a = arguments.a;
    const AttentionCall& call = a.p.call;
    const int row = static_cast<int>(blockIdx.x) % a.rows;
    const int head = static_cast<int>(blockIdx.x) / a.rows;
    const int b = head / call.Hk, hk = head % call.Hk;
    const Band band = decode_band(call, b);
    const DecodeSplits splits(a, band, row / arguments.rows_of_block, arguments.rows_of_block, 1);
    if (splits.one()) return;  // the decode kernel has written the result
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int64_t first = partial_of(a, b, hk, 0, row);  // the next split's are a.rows further
    const float2* stats = reinterpret_cast<const float2*>(a.p.partial_stats) + first;
    const int width = partial_width(call.D);
    const float* partials = a.p.partial_out + first * width;

    float m = -INFINITY;
    for (int s = splits.first + lane; s < splits.last; s += 32)
        m = fmaxf(m, stats[static_cast<int64_t>(s) * a.rows].x);
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2)
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, lanes));
    float l = 0;
    for (int s = splits.first + lane; s < splits.last; s += 32) {
        const float2 own = stats[static_cast<int64_t>(s) * a.rows];
        l = fmaf(own.y, weight_of<T>(own.x, m), l);
    }
    l = warp_sum(l);

    float sum[2][4] = {};  // columns 4 lane ... 4 lane + 3, and the same 128 further
#pragma unroll 4
    for (int s = splits.first + warp; s < splits.last; s += kCombineWarps) {
        const int64_t at = static_cast<int64_t>(s) * a.rows;
        const float weight = weight_of<T>(stats[at].x, m);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int col = 128 * c + 4 * lane;
            if (col >= width) continue;
            const Pack<float, 4> values = ld128(partials + at * width + col);
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[c][e] = fmaf(values.at[e], weight, sum[c][e]);
        }
    }
    float* of_warps = reinterpret_cast<float*>(shared_memory());  // (warps, kMaxHeadWidth)
#pragma unroll
    for (int c = 0; c < 2; ++c)
        st128_shared(of_warps + warp * kMaxHeadWidth + 128 * c + 4 * lane,
                     Pack<float, 4>{sum[c][0], sum[c][1], sum[c][2], sum[c][3]});
    __syncthreads();
    const DecodeRow<T> to(a, b, hk, row);
    const RowEnd end = row_end<T>(call, to.h, m, l);
    if (threadIdx.x == 0) *to.lse = end.lse;
    for (int col = static_cast<int>(threadIdx.x); col < call.D; col += kCombineThreads) {
        float all = 0;
#pragma unroll
        for (int w = 0; w < kCombineWarps; ++w) all += of_warps[w * kMaxHeadWidth + col];
        to.out[col] = from_float<T>(all * end.scale);
    }
}

template <class T>
void launch_attention_decode_in(const AttentionDecode& p, Stream stream) {
    const AttentionCall& c = p.call;
    const int64_t size = sizeof(T);
    const int group = c.H / c.Hk;
    DecodeArguments a{p,
                      group,
                      group * c.Tq,
                      1,
                      scores_are_plain(c),
                      aligned_rows(p.q, size, p.q_strides),
                      aligned_rows(p.k, size, p.k_strides),
                      aligned_rows(p.v, size, p.v_strides),
                      aligned_rows(p.out, size, contiguous_strides(c.Tq, c.H, c.D))};
    a.p.splits = most_splits(c.Tk, p.num_splits);
    const int rows_of_block = launch_attention_decode_of<T>(a, stream);
    if (a.p.splits == 1) return;
    const std::string shape = shape_of(c);
    launch(attention_decode_combine_kernel<T>,
           {"attention_decode_combine_kernel", shape,
            grid_of("attention_decode_combine_kernel", shape,
                    static_cast<int64_t>(c.batch) * c.Hk * a.rows),
            kCombineThreads, sizeof(float) * kCombineWarps * kMaxHeadWidth, stream},
           CombineArguments{a, rows_of_block});
}

}  // namespace

DecodeWorkspaces attention_decode_workspaces(const AttentionDecode& p) {
    const AttentionCall& c = p.call;
    const int splits = most_splits(c.Tk, p.num_splits);
    if (splits == 1) return {0, 0};
    const int64_t partials = int64_t{c.batch} * c.Hk * splits * (c.H / c.Hk * c.Tq);
    return {partials * partial_width(c.D), partials * 2};
}

void launch_attention_decode(DType dtype, const AttentionDecode& p, Stream stream) {
    dispatch(dtype, [&](auto zero) { launch_attention_decode_in<decltype(zero)>(p, stream); });
}

}  // namespace gk
