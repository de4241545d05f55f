// Attention backward on Hopper: which calls its kernels take, its launcher, and the kernels before
// and after the main one. Formulas: attention/bwd/kernel.h; what they are for: attention/bwd/sm90/params.h.
//
// prepare reads out and dout once, and writes 4 bytes for each element of the sum of dq, which it
// clears, and 12 for each row. finish reads the sum and writes dq, (B, Tq, H, D) contiguous.
#include "runtime/launch.h"

#include <algorithm>
#include <utility>

#include "attention/bwd/delta.h"
#include "attention/bwd/sm90/main.h"
#include "runtime/dry_run.h"

namespace gk {

constexpr int kFinishThreads = 256;
// Of q, dout and the sum of dq, that blocks of keys of several heads read side by side: about half
// of L2.
constexpr int64_t kBytesTogether = int64_t{24} << 20;

struct PrepareArguments {
    BwdArguments of;
    int row_blocks, rows;
    int64_t sum_chunks;  // dq_sum's length in chunks of 16 bytes
    int64_t turns;       // how many
};

// Statistics lie block by block: lse of its rows, then delta. Rows past the last one weigh nothing.
template <class T>
__global__ void __launch_bounds__(kDeltaThreads)
    attention_bwd_sm90_prepare_kernel(const __grid_constant__ PrepareArguments a) {
    const AttentionBwd& p = a.of.p;
    const AttentionCall& call = p.call;
    const int64_t threads = static_cast<int64_t>(gridDim.x) * kDeltaThreads;
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kDeltaThreads + threadIdx.x;
    for (int64_t chunk = thread; chunk < a.sum_chunks; chunk += threads)
        st128(p.dq_sum + 4 * chunk, Pack<float, 4>{});
    for (int64_t turn = thread; turn < a.turns; turn += threads) p.turns[turn] = 0;

    const int64_t index = thread / kDeltaLanes, block = index / a.rows, bh = block / a.row_blocks;
    const int row = static_cast<int>(index % a.rows);
    const int64_t i = block % a.row_blocks * a.rows + row;
    if (bh >= static_cast<int64_t>(call.batch) * call.H) return;  // whole warps, of 4 rows each
    const bool exists = i < call.Tq;
    float delta = row_delta<T>(a.of, bh / call.H, i, bh % call.H, exists);
    if (threadIdx.x % kDeltaLanes != 0) return;
    float lse = INFINITY;  // its weights are 0
    if (exists) {
        const int64_t at = bh * call.Tq + i;
        if (p.dlse != nullptr) delta -= p.dlse[at];
        p.delta[at] = delta;
        const float natural = p.lse[at];
        if (natural != -INFINITY)  // else there is no key
            lse = is_finite(natural) && is_finite(delta) ? natural * kLog2e : NAN;
    }
    float* stats = p.row_stats + block * (2 * a.rows) + row;
    stats[0] = lse;
    stats[a.rows] = delta;
}

struct FinishArguments {
    AttentionBwd p;
    int row_blocks, rows, width;
};

// A CTA for each 64 rows. A thread takes two of them, 8 columns each: 64 bytes of the sum, side by
// side.
template <class T>
__global__ void __launch_bounds__(kFinishThreads)
    attention_bwd_sm90_finish_kernel(const __grid_constant__ FinishArguments a) {
    const AttentionCall& call = a.p.call;
    const int halves = a.rows / 64, cols8 = a.width / 8;
    const int64_t tile = blockIdx.x / halves;
    const int row64 = static_cast<int>(blockIdx.x % halves);
    const int64_t bh = tile / a.row_blocks, b = bh / call.H, h = bh % call.H;
    const int64_t i0 = tile % a.row_blocks * a.rows + 64 * row64;
    const float* sum = a.p.dq_sum + tile * (a.rows * a.width);
    T* dq = static_cast<T*>(a.p.dq) + (b * call.Tq * call.H + h) * call.D;
    bool finite = true;
    for (int unit = static_cast<int>(threadIdx.x); unit < cols8 * 32; unit += kFinishThreads) {
        const int col8 = unit % cols8, quad = unit / cols8;  // quad: 8 w + g
        const int64_t i = i0 + quad / 8 * 16 + quad % 8;
        if (i >= call.Tq || 8 * col8 >= call.D) continue;
        float of_row[2][8];
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            const Pack<float, 4> four = ld128(sum + dq_index(a.width, row64, col8, 4 * quad + t));
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                of_row[e / 2][2 * t + e % 2] = four.at[e] * call.softmax_scale;
                finite = finite && is_finite(of_row[e / 2][2 * t + e % 2]);
            }
        }
        T* line = dq + i * call.H * call.D + 8 * col8;
        st128(line, pack_floats<T>(of_row[0]));
        if (i + 8 < call.Tq) st128(line + 8 * call.H * call.D, pack_floats<T>(of_row[1]));
    }
    if (!__all_sync(0xffffffffu, finite) && threadIdx.x % 32 == 0)
        semaphore_release(a.p.turns, 1);
}

namespace {

constexpr int kNone = -1;

// The choice for a problem, or kNone with the reason. The rule's are in the order of their widths,
// up to kMaxHeadWidth.
int choice_of(DType dtype, const AttentionBwd& p, int build, std::string& reason) {
    const AttentionCall& c = p.call;
    if (build < 0) {
        int choice = 0;
        while (c.D > kBwdChoices[choice].width) ++choice;
        return choice;
    }
    if (build >= kBwdChoiceCount)
        reason = "there are " + std::to_string(kBwdChoiceCount) + " builds, counted from 0";
    else if (c.D > kBwdChoices[build].width)
        reason = "it takes heads up to " + std::to_string(kBwdChoices[build].width) + " wide";
    else if (build >= kBwdRuleCount &&
             (dtype != DType::bf16 || c.softcap != 0 || c.alibi_slopes != nullptr))
        reason = "it is built for bf16 without softcap and ALiBi alone";
    return reason.empty() ? build : kNone;
}

// Why none of them can be taken, "" where some can.
void refuse(DType dtype, const AttentionBwd& p, std::string& reason) {
    const AttentionCall& c = p.call;
    reason = attention_sm90_refuses_call(dtype, c);
    if (reason.empty() && c.D % 8 != 0) reason = "a head's width is not a multiple of 8";
    const auto look = [&](const char* name, const void* base, const Strides& strides, int tokens,
                          int heads) {
        if (!reason.empty()) return;
        const TensorMapShape shape =
            attention_map_shape(dtype, base, strides, c.batch, tokens, heads, c.D, 64);
        if (const char* why = tensor_map_refuses(shape)) reason = std::string(name) + ": " + why;
    };
    look("q", p.q, p.q_strides, c.Tq, c.H);
    look("k", p.k, p.k_strides, c.Tk, c.Hk);
    look("v", p.v, p.v_strides, c.Tk, c.Hk);
    look("dout", p.dout, p.dout_strides, c.Tq, c.H);
}

template <size_t... i>
void add_builds(std::vector<Build>& all, std::index_sequence<i...>) {
    (all.push_back(BwdTiles<__nv_bfloat16, i>::build()), ...);
}

int blocks_of(int tokens, int block) { return (tokens + block - 1) / block; }

// The first turn is the flag.
BwdWorkspaces workspaces_of(const AttentionBwd& p, int choice) {
    const BwdChoice& built = kBwdChoices[choice];
    const int64_t tiles =
        int64_t{p.call.batch} * p.call.H * blocks_of(p.call.Tq, built.rows);
    BwdWorkspaces sizes{};
    sizes.dq_sum = p.dq == nullptr ? 0 : tiles * built.rows * built.width;
    sizes.row_stats = tiles * built.rows * 2;
    sizes.turns = 1 + (p.deterministic && p.dq != nullptr ? tiles * built.consumers : 0);
    return sizes;
}

// A key head's blocks side by side with those of others, as far as what they all read stays in L2;
// without a bound on the right all blocks of a head take as long, and go together by themselves.
int heads_together(const AttentionCall& c) {
    const int heads = c.batch * c.Hk;
    if (c.right < 0) return 1;
    const int64_t bytes = int64_t{c.H / c.Hk} * c.Tq * c.D * (2 + 2 + 4);
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(heads, kBytesTogether / bytes)));
}

template <class T>
void launch_main(int choice, const BwdSm90& a, Stream stream) {
    switch (kBwdChoices[choice].width) {
        case 64: return launch_attention_bwd_sm90_main<T, 64>(choice, a, stream);
        case 96: return launch_attention_bwd_sm90_main<T, 96>(choice, a, stream);
        case 128: return launch_attention_bwd_sm90_main<T, 128>(choice, a, stream);
        case 192: return launch_attention_bwd_sm90_main<T, 192>(choice, a, stream);
        default: return launch_attention_bwd_sm90_main<T, 256>(choice, a, stream);
    }
}

template <class T>
void launch_of(DType dtype, const AttentionBwd& p, int choice, Stream stream) {
    const AttentionCall& c = p.call;
    const BwdChoice& built = kBwdChoices[choice];
    const int64_t size = sizeof(T);
    const int row_blocks = blocks_of(c.Tq, built.rows), key_blocks = blocks_of(c.Tk, built.keys);
    const int64_t tiles = int64_t{c.batch} * c.H * row_blocks;
    const BwdWorkspaces sizes = workspaces_of(p, choice);

    const PrepareArguments prepare{
        {p, aligned_16(p.q, size, p.q_strides), aligned_16(p.k, size, p.k_strides),
         aligned_16(p.v, size, p.v_strides), aligned_16(p.dout, size, p.dout_strides),
         aligned_16(p.out, size, contiguous_strides(c.Tq, c.H, c.D))},
        row_blocks, built.rows, sizes.dq_sum / 4, sizes.turns};
    constexpr int64_t kRows = kDeltaThreads / kDeltaLanes;
    launch(attention_bwd_sm90_prepare_kernel<T>,
           {"attention_bwd_sm90_prepare_kernel", shape_of(c),
            grid_of("attention_bwd_sm90_prepare_kernel", c,
                    (tiles * built.rows + kRows - 1) / kRows),
            kDeltaThreads, 0, stream},
           prepare);

    const auto map = [&](const void* base, const Strides& strides, int tokens, int heads,
                         int rows) {
        return tensor_map(
            attention_map_shape(dtype, base, strides, c.batch, tokens, heads, c.D, rows));
    };
    BwdSm90 a{p};
    a.q = map(p.q, p.q_strides, c.Tq, c.H, built.rows);
    a.k = map(p.k, p.k_strides, c.Tk, c.Hk, built.keys);
    a.v = map(p.v, p.v_strides, c.Tk, c.Hk, built.keys);
    a.dout = map(p.dout, p.dout_strides, c.Tq, c.H, built.rows);
    const Strides keys = contiguous_strides(c.Tk, c.Hk, c.D);
    const int stored = built.wide() ? built.keys : 64;  // of keys, by a warpgroup
    if (p.dk != nullptr) a.dk = map(p.dk, keys, c.Tk, c.Hk, stored);
    if (p.dv != nullptr) a.dv = map(p.dv, keys, c.Tk, c.Hk, stored);
    a.row_blocks = row_blocks;
    a.key_blocks = key_blocks;
    a.heads_together = heads_together(c);
    launch_main<T>(choice, a, stream);

    if (p.dq == nullptr) return;
    launch(attention_bwd_sm90_finish_kernel<T>,
           {"attention_bwd_sm90_finish_kernel", shape_of(c),
            grid_of("attention_bwd_sm90_finish_kernel", c, tiles * (built.rows / 64)),
            kFinishThreads, 0, stream},
           {p, row_blocks, built.rows, built.width});
}

}  // namespace

std::vector<Build> attention_bwd_builds() {
    std::vector<Build> all;
    add_builds(all, std::make_index_sequence<kBwdChoiceCount>());
    return all;
}

std::string attention_bwd_sm90_refuses(DType dtype, const AttentionBwd& p) {
    std::string reason;
    refuse(dtype, p, reason);
    return reason;
}

BwdWorkspaces attention_bwd_sm90_workspaces(DType dtype, const AttentionBwd& p, int device,
                                            int build) {
    std::string reason;
    if (capability(device) != 90)
        reason = "the device's compute capability is not 9.0";
    else
        refuse(dtype, p, reason);
    int choice = kNone;
    if (reason.empty()) choice = choice_of(dtype, p, build, reason);
    if (choice != kNone) return workspaces_of(p, choice);
    if (build >= 0)
        throw Error("attention backward on " + shape_of(p.call) + " by build " +
                    std::to_string(build) + ": " + reason);
    if (capability(device) == 90) dry_run_refused("attention_bwd_sm90", reason);
    return {};
}

void launch_attention_bwd_sm90(DType dtype, const AttentionBwd& p, int build, Stream stream) {
    std::string reason;
    const int choice = choice_of(dtype, p, build, reason);
    if (dtype == DType::bf16)
        launch_of<__nv_bfloat16>(dtype, p, choice, stream);
    else
        launch_of<__half>(dtype, p, choice, stream);
}

}  // namespace gk
