// Attention forward on Hopper: which calls its kernel takes, the ways in which it is built, and the
// choice among them. The kernel, its formula and what it moves are in attention/fwd/sm90/kernel.h.
#include "attention/fwd/sm90/tiles.h"

#include <string>
#include <vector>

namespace gk {
namespace {

template <class Tiles>
constexpr Build described(const char* name) {
    return {name,
            Tiles::kWidth,
            Tiles::kRows,
            Tiles::kKeys,
            0,
            kFwdSm90Stages,
            Tiles::kConsumers,
            1,
            Tiles::kPingPong,
            Tiles::kThreads,
            Tiles::kSharedBytes};
}

using LaunchTiles = void (*)(const AttentionFwd& p, const Build& built, Stream stream);

// One way to build the kernel, and its launchers; null where it is not built so.
struct Row {
    Build build;
    LaunchTiles plain_bf16, plain_f16, options_bf16, options_f16;
};

// What the rule chooses is built in both dtypes, kPlain without options and kOptions with them;
// what tuning compares with it in bf16 without options.
template <template <class> class Tiles, bool kPlain, bool kOptions>
Row row(const char* name) {
    using Bf16 = Tiles<__nv_bfloat16>;
    using F16 = Tiles<__half>;
    Row found{described<Bf16>(name), launch_attention_fwd_sm90_tiles<Bf16, false>, nullptr,
                nullptr, nullptr};
    if constexpr (kPlain) found.plain_f16 = launch_attention_fwd_sm90_tiles<F16, false>;
    if constexpr (kOptions) {
        found.options_bf16 = launch_attention_fwd_sm90_tiles<Bf16, true>;
        found.options_f16 = launch_attention_fwd_sm90_tiles<F16, true>;
    }
    return found;
}

// Of each head width, what the rule chooses comes first. Tiles are FlashAttention-3's
// (hopper/tile_size.h there) where their weights fit in registers; options need registers too.
const std::vector<Row>& table() {
    static const std::vector<Row> all{
        row<Fwd64, true, true>("D64 192x128, 3 consumers, ping-pong"),
        row<Fwd64Apart, false, false>("D64 192x128, 3 consumers"),
        row<Fwd64Low, false, false>("D64 128x128, 2 consumers, ping-pong"),
        row<Fwd64Wide, false, false>("D64 128x192, 2 consumers, ping-pong"),
        row<Fwd96, true, true>("D96 128x128, 2 consumers, ping-pong"),
        row<Fwd96High, false, false>("D96 192x96, 3 consumers, ping-pong"),
        row<Fwd128, true, true>("D128 128x128, 2 consumers, ping-pong"),
        row<Fwd128Wide, true, false>("D128 128x176, 2 consumers, ping-pong"),
        row<Fwd128Apart, false, false>("D128 128x128, 2 consumers"),
        row<Fwd128High, false, false>("D128 192x80, 3 consumers, ping-pong"),
        row<Fwd192, true, false>("D192 128x112, 2 consumers"),
        row<Fwd192Narrow, false, true>("D192 128x80, 2 consumers"),
        row<Fwd256, true, false>("D256 128x80, 2 consumers"),
        row<Fwd256Narrow, false, true>("D256 128x64, 2 consumers"),
    };
    return all;
}

int bucket_of(int D) {
    for (const int width : {64, 96, 128, 192})
        if (D <= width) return width;
    return kMaxHeadWidth;
}

LaunchTiles launcher(const Row& row, DType dtype, const AttentionCall& c) {
    if (dtype == DType::f16) return scores_are_plain(c) ? row.plain_f16 : row.options_f16;
    return scores_are_plain(c) ? row.plain_bf16 : row.options_bf16;
}

// The first that is built for the call; where every row sees every key, a wider block of keys, if
// no more than 1/16 is lost in the last one.
int choice(const AttentionCall& c) {
    const bool dense = c.left < 0 && c.right < 0;
    int found = -1;
    for (int i = 0; i < static_cast<int>(table().size()); ++i) {
        const Row& row = table()[i];
        // The rule's are those that are built in fp16 too.
        if (row.build.head_width != bucket_of(c.D) || !launcher(row, DType::f16, c))
            continue;
        const int keys = row.build.tile_n, past = (keys - c.Tk % keys) % keys;
        if (found < 0 || (dense && keys > table()[found].build.tile_n && past <= c.Tk / 16))
            found = i;
    }
    return found;
}

}  // namespace

std::vector<Build> attention_fwd_builds() {
    std::vector<Build> found;
    for (const Row& row : table()) found.push_back(row.build);
    return found;
}

std::string attention_fwd_sm90_refuses(DType dtype, const AttentionFwd& p) {
    const AttentionCall& c = p.call;
    std::string reason = attention_sm90_refuses_call(dtype, c);
    const auto ask = [&](const char* name, const void* base, const Strides& strides, int tokens,
                         int heads) {
        if (reason.empty())
            reason = attention_sm90_refuses_tensor(
                name, attention_map_shape(dtype, base, strides, c.batch, tokens, heads, c.D,
                                          kWarpgroupRows));
    };
    ask("q", p.q, p.q_strides, c.Tq, c.H);
    ask("k", p.k, p.k_strides, c.Tk, c.Hk);
    ask("v", p.v, p.v_strides, c.Tk, c.Hk);
    ask("out", p.out, contiguous_strides(c.Tq, c.H, c.D), c.Tq, c.H);
    return reason;
}

void launch_attention_fwd_sm90(DType dtype, const AttentionFwd& p, Stream stream, int build) {
    const int count = static_cast<int>(table().size());
    if (build >= count)
        throw Error("attention's forward kernel has " + std::to_string(count) +
                    " builds, there is no number " + std::to_string(build));
    const Row& row = table()[build < 0 ? choice(p.call) : build];
    const std::string name = "build " + std::string(row.build.name);
    if (row.build.head_width != bucket_of(p.call.D))
        throw Error(name + " is for other head widths than " + std::to_string(p.call.D));
    const LaunchTiles launch = launcher(row, dtype, p.call);
    if (launch == nullptr)
        throw Error(name + " is not built for this dtype with these options");
    launch(p, row.build, stream);
}

}  // namespace gk
