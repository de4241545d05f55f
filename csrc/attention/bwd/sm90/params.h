// Attention backward on Hopper: how its kernels are told what to do. Formulas:
// attention/bwd/kernel.h.
//
//     prepare   delta of each row, lse in units of log2(e); clears the sum of dq
//     main      dk and dv of a block of keys; adds to the sum of dq: attention/bwd/sm90/kernel.h
//     finish    dq = scale * sum
//
// In the main kernel's products weights of 0 meet what a row does not see, and 0 * NaN is NaN. So
// it and `finish` raise a flag where a result is not finite, and then the generic kernels, launched
// after them in any case, do everything again; else they return at once.
#pragma once

#include <iterator>

#include "attention/bwd/kernel.h"
#include "attention/sm90.h"
#include "runtime/choose.h"

namespace gk {

// Of one launch, in both kernels that know the tiles.
struct BwdSm90 {
    AttentionBwd p;
    TensorMap q, k, v, dout;  // a panel of a block of rows, of a block of keys
    TensorMap dk, dv;         // a panel of what a warpgroup stores; empty where not wanted
    int row_blocks, key_blocks;
    int heads_together;  // key heads whose blocks are worked off side by side, for L2
};

// How the sum of dq lies in memory: tiles (B, H, row_blocks), in each the accumulators of m64nNk16
// as they lie in the registers: (rows / 64, columns / 8, 128 threads, 4). So warpgroups write it to
// shared memory, and bulk additions to memory, without a stride. The index is that of a thread's
// four elements, in rows 16 w + g and 16 w + g + 8 of the 64, and columns 2t and 2t + 1 of the 8.
__host__ __device__ constexpr int dq_index(int width, int row64, int col8, int thread) {
    return ((row64 * (width / 8) + col8) * 128 + thread) * 4;
}

// What the main kernel is built of, by number.
struct BwdRow {
    const char* name;
    int width;        // of a head, at most
    int rows, keys;   // queries of a step, keys of a CTA
    int consumers;    // warpgroups that multiply
    int dout_stages;  // blocks of dout in flight; of q there are two
    bool early;       // dv is multiplied while ds is computed, else after it
    Rule rule;
    // From 192 on dk and dv of 64 keys fill a warpgroup's registers: there it has 64 or 128 columns
    // of them, for all keys.
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

// What attention adds to its scores.
inline bool bwd_has_options(const AttentionCall& c) {
    return c.softcap != 0 || c.alibi_slopes != nullptr;
}

// build: a number, of a build for heads of this width. One translation unit for each T and width.
template <class T, int kWidth>
void launch_attention_bwd_sm90_main(const BwdSm90& a, int build, Stream stream);

// With the workspaces that attention_bwd_workspaces says for the same arguments.
void launch_attention_bwd_sm90(DType dtype, const AttentionBwd& p, int build, Stream stream);

}  // namespace gk
