// What the kernels of attention's backward pass share.
//
//     p = exp(s - lse)                                dp = keep * dropout_scale * (dout . v)
//     delta = sum_d dout * out - dlse                 ds = p * (dp - delta) * slope of softcap
//     dv = sum_i keep * dropout_scale * p dout        dk = scale * sum_i ds q
//     dq = scale * sum_j ds k
//
// In fp32 this formula for delta is not precise enough: where a row has few keys, ds is a small
// difference, and the rounding of out, of lse and of a sum in another order outweighs the rounding
// of eager PyTorch. So in fp32 the queries kernel first sums p and p dp itself; p is divided by its
// sum, delta is the quotient of the two sums, and dlse is added last.
//
// 0 * NaN is NaN: NaN or Inf in a row of q, k or dout would reach, through a product, rows that do
// not see it. So in blocks with a mask such a row is cleared before the products, and the pairs
// that do see it get NaN in another place: through lse where q or dout is not finite, through
// `taint` where k is not. In blocks without a mask every query sees every key, so nothing has to be
// cleared.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention/scores.h"
#include "device/copy.h"
#include "device/exp2.h"
#include "device/mma.h"
#include "device/philox.h"
#include "device/tile.h"
#include "device/vector.h"

namespace gk {

// Whether each row's sums of p and p dp are computed again, as they are in fp32.
template <class T>
constexpr bool kExact = std::is_same_v<T, float>;

struct BwdArguments {
    AttentionBwd p;
    // Whether every row starts at a multiple of 16 bytes.
    bool q_aligned, k_aligned, v_aligned, dout_aligned, out_aligned;
    // If this points to a 0, the kernels return at once: the Hopper kernels before them have done
    // the work. To make that cheap, no more CTAs are launched than run at a time, and each CTA
    // loops over blocks of work. Null if no Hopper kernels ran.
    const int* only_if;
};

template <class T>
BwdArguments bwd_arguments(const AttentionBwd& p) {
    const AttentionCall& c = p.call;
    const int64_t size = sizeof(T);
    return {p,
            aligned_rows(p.q, size, p.q_strides),
            aligned_rows(p.k, size, p.k_strides),
            aligned_rows(p.v, size, p.v_strides),
            aligned_rows(p.dout, size, p.dout_strides),
            aligned_rows(p.out, size, contiguous_strides(c.total_q, c.H, c.D)),
            nullptr};
}

// Calls work(block) for each block of work of this CTA. A CTA has only one without only_if, and in
// fp32, which no Hopper kernel takes. `next` is the offset of 4 bytes of shared memory that hold
// the number of the next block, since no register is left for it.
template <class T, class Work>
__device__ __forceinline__ void for_blocks(const BwdArguments& a, unsigned blocks, int next,
                                           Work&& work) {
    unsigned block = blockIdx.x;
    if (kExact<T>) return work(static_cast<int>(block));
    if (a.only_if != nullptr && *a.only_if == 0) return;
    unsigned* kept = reinterpret_cast<unsigned*>(shared_memory() + next);
#pragma unroll 1
    do {
        if (threadIdx.x == 0) *kept = block + gridDim.x;
        work(static_cast<int>(block));
        __syncthreads();  // all threads are done with the tiles of this block
        block = *kept;
        __syncthreads();  // and have read *kept
    } while (block < blocks);
}

// The grid of a kernel with this many blocks of work.
template <class Tiles>
dim3 grid_for(const char* kernel, const std::string& shape, const BwdArguments& a, int64_t blocks,
              int device) {
    const dim3 all = grid_of(kernel, shape, blocks);
    if (a.only_if == nullptr) return all;
    // A multiprocessor has room for 256 threads of up to 256 registers.
    const int resident = multiprocessors(device) * (256 / Tiles::kThreads);
    return dim3(std::min(all.x, static_cast<unsigned>(resident)));
}

// The statistics of a row from which ds is computed.
struct RowStats {
    float lse;    // in units of log2(e); inf: the weights are 0, NaN: the row is not finite
    float delta;  // sum of dout * out; the 16-bit kernels have dlse subtracted from it
    float total;  // sum of the weights that lse gives, the sink's too; only the fp32 kernels set it
    float dlse;   // only the fp32 kernels set it
};

// The statistics of row i of head h. total: (B, H, Tq), or null where it is not known yet.
template <class T>
__device__ __forceinline__ RowStats row_stats(const AttentionBwd& p, const float* total,
                                              const Entry& entry, int h, int i) {
    RowStats row{INFINITY, 0, 1, 0};  // for a row past the end
    if (i >= entry.Tq) return row;
    const int64_t at = entry.row(p.call, h, i);
    const float lse = p.lse[at];
    row.delta = p.delta[at];
    if (lse != -INFINITY)  // -inf: the row sees no key
        row.lse = is_finite(lse) && is_finite(row.delta) ? lse * kLog2e : NAN;
    if (kExact<T> && total != nullptr) row.total = total[at];
    if (kExact<T> && p.dlse != nullptr) row.dlse = p.dlse[at];
    return row;
}

// dq_sum consists of tiles of `rows` queries, query_blocks of them for each head. Returns the
// number of the first tile of entry b and head h.
__device__ inline int64_t first_tile(const AttentionCall& c, const Entry& entry, int b, int h,
                                     int rows) {
    return (static_cast<int64_t>(entry.in_memory) * c.H + h) * query_blocks(c, rows) +
           (c.ragged() ? entry.q0 / rows + b : 0);
}

// Computes p from the product q.k. kPlain: without softcap and ALiBi. The bits do not depend on
// kPlain.
template <class T, bool kPlain>
__device__ __forceinline__ float weight_of(float product, float lse, const Score& score,
                                           int distance, float& slope_of_cap) {
    slope_of_cap = 1;
    if (kPlain || (score.softcap == 0 && score.slope == 0))
        return exp2_for<T>(fmaf(product, score.factor, -lse));
    return exp2_for<T>(fmaf(score(product, distance, slope_of_cap), kLog2e, -lse));
}

// The weight of the sink in a row's softmax, by the row's lse in log2 units; 0 without sinks.
__device__ __forceinline__ float weight_of_sink(const AttentionCall& c, int h, float lse) {
    return c.sinks == nullptr ? 0.0f : exp2f(fmaf(c.sinks[h], kLog2e, -lse));
}

// Turns the products s = q.k and dp = dout.v of a pair into its weight (s, as it multiplies dout)
// and ds (dp). Returns the gradient of the pair's score, which is ds before the softcap's slope.
template <class T, bool kPlain>
__device__ __forceinline__ float weigh(float& s, float& dp, const RowStats& row, const Score& score,
                                       int distance, bool dropping, bool keep,
                                       float dropout_scale) {
    float slope_of_cap;
    float p = weight_of<T, kPlain>(s, row.lse, score, distance, slope_of_cap);
    if (kExact<T>) p /= row.total;
    s = p;
    if (!kPlain && dropping) {
        s = keep ? p : 0.0f;
        dp = keep ? dp * dropout_scale : 0.0f;
    }
    dp -= row.delta;
    if (kExact<T>) dp += row.dlse;
    const float of_score = dp * p;
    dp = of_score * slope_of_cap;
    return of_score;
}

// Clears every row that holds a value that is not finite. All threads call this together. If
// `taint` is not null, it becomes NaN for these rows and 0 for the others. The caller puts barriers
// around the call.
template <int kThreads, class T, int kRows, int kWidth>
__device__ void clear_nonfinite_rows(const SharedTile<T, kRows, kWidth>& tile, float* taint) {
    const int lane = lane_index();
#pragma unroll 1
    for (int row = static_cast<int>(threadIdx.x) / 32; row < kRows; row += kThreads / 32) {
        bool finite = true;
        for (int col = lane * kPer128<T>; col < kWidth; col += 32 * kPer128<T>) {
            const Pack<T, kPer128<T>> chunk = ld128(tile.at(row, col));
#pragma unroll
            for (int k = 0; k < kPer128<T>; ++k)
                finite = finite && is_finite(to_float(chunk.at[k]));
        }
        const bool found = __any_sync(0xffffffffu, !finite) != 0;
        if (taint != nullptr && lane == 0) taint[row] = found ? NAN : 0.0f;
        if (!found) continue;
        __syncwarp();  // every lane has read what another one clears
        for (int col = lane; col < kWidth; col += 32) *tile.at(row, col) = T(0.0f);
    }
}

template <int kTiles, int kCols>
__device__ __forceinline__ void clear(float (&acc)[kTiles][kCols][4]) {
#pragma unroll
    for (int r = 0; r < kTiles; ++r)
#pragma unroll
        for (int n = 0; n < kCols; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[r][n][e] = 0;
}

// acc = a b^T, for this warp's rows of a, from row0 on, and all rows of b.
template <class T, int kTiles, int kCols, int kRowsA, int kRowsB, int kWidth>
__device__ __forceinline__ void multiply_rows(float (&acc)[kTiles][kCols][4],
                                              const SharedTile<T, kRowsA, kWidth>& a_tile, int row0,
                                              const SharedTile<T, kRowsB, kWidth>& b_tile) {
    using M = Mma<T>;
    static_assert(kCols * 8 == kRowsB, "a column for each row of b");
    clear(acc);
    // fp32 fragments are four times as large: with more unrolling the registers would not suffice.
    [[maybe_unused]] constexpr int kUnroll = sizeof(T) == 2 ? kWidth / M::K : 1;
#pragma unroll kUnroll
    for (int d = 0; d < kWidth; d += M::K) {
        typename M::A a[kTiles];
#pragma unroll
        for (int r = 0; r < kTiles; ++r) load_a(a[r], a_tile, row0 + 16 * r, d);
#pragma unroll
        for (int n = 0; n < kRowsB; n += 16) {
            typename M::B b[2];
            load_b(b, b_tile, n, d);
#pragma unroll
            for (int r = 0; r < kTiles; ++r) {
                M::multiply(acc[r][n / 8], a[r], b[0]);
                M::multiply(acc[r][n / 8 + 1], a[r], b[1]);
            }
        }
    }
}

// out += weights tile. The weights are rounded to T one fragment at a time.
template <class T, int kTiles, int kCols, int kOutCols, int kRows, int kWidth>
__device__ __forceinline__ void add_products(float (&out)[kTiles][kOutCols][4],
                                             const float (&weights)[kTiles][kCols][4],
                                             const SharedTile<T, kRows, kWidth>& tile) {
    using M = Mma<T>;
    static_assert(kCols * 8 == kRows && kOutCols * 8 == kWidth, "shapes of a product");
#pragma unroll
    for (int k = 0; k < kRows; k += M::K) {
        typename M::A a[kTiles];
#pragma unroll
        for (int r = 0; r < kTiles; ++r) a[r] = M::from_accumulators(&weights[r][k / 8]);
#pragma unroll
        for (int n = 0; n < kWidth; n += 16) {
            typename M::B b[2];
            load_b_transposed(b, tile, k, n);
#pragma unroll
            for (int r = 0; r < kTiles; ++r) {
                M::multiply(out[r][n / 8], a[r], b[0]);
                M::multiply(out[r][n / 8 + 1], a[r], b[1]);
            }
        }
    }
}

// Stores this warp's accumulators, times scale, to a matrix D wide: the rows from `first` on (16
// for each tile) that are below `last`, and the columns from col0 on.
template <class T, int kTiles, int kCols>
__device__ __forceinline__ void store_rows(T* to, int64_t row_stride, int first, int last, int col0,
                                           int D, const float (&acc)[kTiles][kCols][4],
                                           float scale) {
    const int lane = lane_index();
#pragma unroll
    for (int r = 0; r < kTiles; ++r)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first + 16 * r + 8 * half + lane / 4;
            if (row >= last) continue;
            T* line = to + row * row_stride;
#pragma unroll
            for (int n = 0; n < kCols; ++n) {
                const int col = col0 + 8 * n + 2 * (lane % 4);
                const Pack<T, 2> pair = from_floats<T>(acc[r][n][2 * half] * scale,
                                                       acc[r][n][2 * half + 1] * scale);
                if (D % 2 == 0) {
                    if (col < D) *reinterpret_cast<Pack<T, 2>*>(line + col) = pair;
                } else {
                    if (col < D) line[col] = pair.at[0];
                    if (col + 1 < D) line[col + 1] = pair.at[1];
                }
            }
        }
}

// Each T is compiled in a translation unit of its own.
template <class T>
void launch_attention_bwd_queries(const BwdArguments& a, Stream stream);
template <class T>
void launch_attention_bwd_keys(const BwdArguments& a, Stream stream);

}  // namespace gk
