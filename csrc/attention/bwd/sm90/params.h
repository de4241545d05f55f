// Attention backward on Hopper: its kernels and their arguments. Formulas: attention/bwd/kernel.h.
//
//     prepare   delta of each row, lse in units of log2(e); clears the sum of dq
//     main      dk and dv of a block of keys; adds to the sum of dq: attention/bwd/sm90/kernel.h
//     finish    dq = scale * sum
//
// In the main kernel's products a weight of 0 meets rows that are not seen, and 0 * NaN is NaN. So
// the main kernel and `finish` raise a flag where a result is not finite. The generic kernels are
// always launched after them: if the flag is raised, they compute everything again; otherwise they
// return at once.
#pragma once

#include <iterator>

#include "attention/bwd/kernel.h"
#include "attention/sm90.h"
#include "runtime/choose.h"

namespace gk {

// The arguments of one launch of the main kernel.
struct BwdSm90 {
    AttentionBwd p;
    TensorMap q, k, v, dout;  // boxes: one panel of a block of rows, or of a block of keys
    TensorMap dk, dv;         // boxes: one panel that a warpgroup stores; empty: not wanted
    int row_blocks, key_blocks;
    int heads_together;  // key heads whose blocks are worked on side by side, for L2
};

// The layout of the sum of dq in memory: tiles (B, H, row_blocks), each with the accumulators of
// m64nNk16 as they lie in the registers: (rows / 64, columns / 8, 128 threads, 4). So warpgroups
// write to shared memory, and bulk additions to memory, without a stride. The index is that of the
// four elements of thread 32 w + 4 g + t: rows 16 w + g and 16 w + g + 8 of the 64, columns 2t and
// 2t + 1 of the 8.
__host__ __device__ constexpr int dq_index(int width, int row64, int col8, int thread) {
    return ((row64 * (width / 8) + col8) * 128 + thread) * 4;
}

// A build of the main kernel; its index in kBwdRows is its number.
struct BwdRow {
    const char* name;
    int width;        // of a head, at most
    int rows, keys;   // queries of a step, keys of a CTA
    int consumers;    // warpgroups that multiply
    int dout_stages;  // blocks of dout in flight; of q there are two
    bool early;       // dv is multiplied while ds is computed, else after it
    Rule rule;
    // From 192 columns on, dk and dv of 64 keys would fill a warpgroup's registers. There a
    // warpgroup computes 64 or 128 columns of dk and dv, for all keys.
    constexpr bool wide() const { return width > 128; }
};

constexpr BwdRow kBwdRows[] = {
    {"64: 128x128", 64, 128, 128, 2, 2, false, Rule::always},
    {"96: 64x128", 96, 64, 128, 2, 2, true, Rule::always},
    {"128: 64x128", 128, 64, 128, 2, 2, true, Rule::always},
    {"192: 64x96", 192, 64, 96, 3, 1, false, Rule::always},
    {"256: 64x64", 256, 64, 64, 2, 1, false, Rule::always},
    {"64: 128x128, one stage of dout", 64, 128, 128, 2, 1, false, Rule::never},
    {"128: 64x128, dv after ds", 128, 64, 128, 2, 2, false, Rule::never},
    {"128: 64x128, one stage of dout", 128, 64, 128, 2, 1, true, Rule::never},
};
constexpr int kBwdCount = std::size(kBwdRows);

// Whether a softcap or ALiBi changes the scores.
inline bool bwd_has_options(const AttentionCall& c) {
    return c.softcap != 0 || c.alibi_slopes != nullptr;
}

// build: the number of a build for heads of this width. Each pair of T and kWidth is compiled in a
// translation unit of its own.
template <class T, int kWidth>
void launch_attention_bwd_sm90_main(const BwdSm90& a, int build, Stream stream);

// The workspaces have the sizes that attention_bwd_workspaces returns for the same arguments.
void launch_attention_bwd_sm90(DType dtype, const AttentionBwd& p, int build, Stream stream);

}  // namespace gk
