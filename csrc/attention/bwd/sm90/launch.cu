// Attention backward on Hopper: which calls its kernels take, its launcher, and the kernels before
// and after the main one. Formulas: attention/bwd/kernel.h; what each kernel does:
// attention/bwd/sm90/params.h.
//
// prepare reads out and dout once. It writes 4 bytes for each element of the sum of dq, which it
// clears, and 12 bytes for each row. finish reads the sum and writes dq, (B, Tq, H, D) contiguous.
#include <algorithm>

#include "attention/bwd/delta.h"
#include "attention/bwd/sm90/main.h"
#include "runtime/dry_run.h"

namespace gk {

constexpr int kFinishThreads = 256;
// The bytes of q, dout and the sum of dq that the blocks of keys of several heads may read when
// they run side by side: about half of L2.
constexpr int64_t kBytesTogether = int64_t{24} << 20;

struct PrepareArguments {
    BwdArguments of;
    int row_blocks, rows;
    int64_t sum_chunks;  // dq_sum's length in chunks of 16 bytes
    int64_t turns;       // how many turns there are, to be cleared
};

// The statistics lie block by block: lse of the block's rows, then delta. Rows past the last one
// have weight 0.
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
    float lse = INFINITY;  // the weights of this row are then 0
    if (exists) {
        const int64_t at = bh * call.Tq + i;
        if (p.dlse != nullptr) delta -= p.dlse[at];
        p.delta[at] = delta;
        const float natural = p.lse[at];
        if (natural != -INFINITY)  // -inf: the row sees no key
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

// Each CTA takes 64 rows. A thread takes 8 columns of two of these rows: 64 contiguous bytes of the
// sum.
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
        const int col8 = unit % cols8, quad = unit / cols8;  // quad: 8 w + g, as in dq_index
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

constexpr const char* kName = "attention_bwd_sm90";

// Returns why none of the builds can take a problem, or "" where one can.
std::string refuses(DType dtype, const AttentionBwd& p) {
    const AttentionCall& c = p.call;
    std::string reason = attention_sm90_refuses_call(dtype, c);
    if (reason.empty() && c.D % 8 != 0) reason = "a head's width is not a multiple of 8";
    if (reason.empty() && p.by_query != nullptr)
        reason = "the gradient of slopes is summed by queries, and its blocks are of keys";
    const auto ask = [&](const char* name, const void* base, const Strides& strides, int tokens,
                         int heads) {
        if (reason.empty())
            reason = attention_sm90_refuses_tensor(
                name,
                attention_map_shape(dtype, base, strides, c.batch, tokens, heads, c.D, 64));
    };
    ask("q", p.q, p.q_strides, c.Tq, c.H);
    ask("k", p.k, p.k_strides, c.Tk, c.Hk);
    ask("v", p.v, p.v_strides, c.Tk, c.Hk);
    ask("dout", p.dout, p.dout_strides, c.Tq, c.H);
    return reason;
}

// For each head width the rule chooses the one build that takes calls with and without options.
Choice by_rule(int width) {
    int number = 0;
    while (kBwdRows[number].width != width || kBwdRows[number].rule != Rule::always) ++number;
    return {number};
}

Choice choose_attention_bwd(DType dtype, const AttentionBwd& p, int build, int device) {
    const int width = padded_width(p.call.D);
    return choose(
        kName, kBwdBuilds, p.call, build, device, [&] { return refuses(dtype, p); },
        [&](int number) {
            return build_refuses(kBwdBuilds[number], dtype, bwd_has_options(p.call), width);
        },
        [&] { return by_rule(width); });
}

// turns[0] is the flag that a result is not finite.
BwdWorkspaces workspaces_of(const AttentionBwd& p, int build) {
    const BwdRow& built = kBwdRows[build];
    const int64_t tiles = int64_t{p.call.batch} * p.call.H * divide_up(p.call.Tq, built.rows);
    BwdWorkspaces sizes{};
    sizes.dq_sum = p.dq == nullptr ? 0 : tiles * built.rows * built.width;
    sizes.row_stats = tiles * built.rows * 2;
    sizes.turns = 1 + (p.deterministic && p.dq != nullptr ? tiles * built.consumers : 0);
    return sizes;
}

// How many key heads have their blocks of keys worked on side by side: as many as read no more than
// stays in L2. Without a bound on the right this is one head: all blocks of a head then take
// equally long, and so stay together by themselves.
int heads_together(const AttentionCall& c) {
    const int heads = c.batch * c.Hk;
    if (c.right < 0) return 1;
    const int64_t bytes = int64_t{c.H / c.Hk} * c.Tq * c.D * (2 + 2 + 4);
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(heads, kBytesTogether / bytes)));
}

template <class T>
void launch_of(DType dtype, const AttentionBwd& p, int build, Stream stream) {
    const AttentionCall& c = p.call;
    const BwdRow& built = kBwdRows[build];
    const int row_blocks = divide_up(c.Tq, built.rows), key_blocks = divide_up(c.Tk, built.keys);
    const int64_t tiles = int64_t{c.batch} * c.H * row_blocks;
    const BwdWorkspaces sizes = workspaces_of(p, build);
    const std::string shape = shape_of(c);

    const PrepareArguments prepare{bwd_arguments<T>(p), row_blocks, built.rows, sizes.dq_sum / 4,
                                   sizes.turns};
    constexpr int64_t kRows = kDeltaThreads / kDeltaLanes;
    launch(attention_bwd_sm90_prepare_kernel<T>,
           {"attention_bwd_sm90_prepare_kernel", shape,
            grid_of("attention_bwd_sm90_prepare_kernel", shape,
                    divide_up(tiles * built.rows, kRows)),
            kDeltaThreads, 0, stream},
           prepare);

    const auto map = [&](const void* base, const Strides& strides, int tokens, int heads, int rows,
                         int panel_cols) {
        return tensor_map(attention_map_shape(dtype, base, strides, c.batch, tokens, heads, c.D,
                                              rows, panel_cols));
    };
    const auto of_queries = [&](const void* base, const Strides& strides) {
        return map(base, strides, c.Tq, c.H, built.rows, swizzled_panel_cols(built.width));
    };
    const auto of_keys = [&](const void* base, const Strides& strides, int rows) {
        return map(base, strides, c.Tk, c.Hk, rows, kKeyPanelCols);
    };
    BwdSm90 a{p};
    a.q = of_queries(p.q, p.q_strides);
    a.k = of_keys(p.k, p.k_strides, built.keys);
    a.v = of_keys(p.v, p.v_strides, built.keys);
    a.dout = of_queries(p.dout, p.dout_strides);
    const Strides keys = contiguous_strides(c.Tk, c.Hk, c.D);
    const int stored = built.wide() ? built.keys : 64;  // rows of keys that a warpgroup stores
    if (p.dk != nullptr) a.dk = of_keys(p.dk, keys, stored);
    if (p.dv != nullptr) a.dv = of_keys(p.dv, keys, stored);
    a.row_blocks = row_blocks;
    a.key_blocks = key_blocks;
    a.heads_together = heads_together(c);
    dispatch_width(c.D, [&](auto width) {
        launch_attention_bwd_sm90_main<T, width>(a, build, stream);
    });

    if (p.dq == nullptr) return;
    launch(attention_bwd_sm90_finish_kernel<T>,
           {"attention_bwd_sm90_finish_kernel", shape,
            grid_of("attention_bwd_sm90_finish_kernel", shape, tiles * (built.rows / 64)),
            kFinishThreads, 0, stream},
           {p, row_blocks, built.rows, built.width});
}

}  // namespace

std::vector<Build> attention_bwd_builds() { return {kBwdBuilds.begin(), kBwdBuilds.end()}; }

BwdWorkspaces attention_bwd_sm90_workspaces(DType dtype, const AttentionBwd& p, int build,
                                            Stream stream) {
    const Choice choice = choose_attention_bwd(dtype, p, build, stream.device);
    if (choice.build != kAnyGpu) return workspaces_of(p, choice.build);
    dry_run_refused(kName, choice.reason);
    return {};
}

void launch_attention_bwd_sm90(DType dtype, const AttentionBwd& p, int build, Stream stream) {
    const Choice choice = choose_attention_bwd(dtype, p, build, stream.device);
    if (dtype == DType::bf16)
        launch_of<__nv_bfloat16>(dtype, p, choice.build, stream);
    else
        launch_of<__half>(dtype, p, choice.build, stream);
}

}  // namespace gk
