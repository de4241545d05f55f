// Attention forward on Hopper: which calls its kernel takes, and which build runs. The kernel, its
// formula and the bytes that it moves are in attention/fwd/sm90/kernel.h.
#include "attention/fwd/sm90/launch.h"

#include "attention/fwd/sm90/tiles.h"
#include "attention/scores.h"

namespace gk {
namespace {

std::string refuses(DType dtype, const AttentionFwd& p) {
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

// The first build that the rule may choose. Where every row sees every key, a build with a wider
// block of keys replaces it, if the last block has at most Tk / 16 keys too many.
Choice by_rule(const AttentionCall& c, bool options) {
    const bool dense = c.left < 0 && c.right < 0;
    Choice found;
    for (int i = 0; i < kFwdCount; ++i) {
        const Build& build = kFwdBuilds[i];
        if (build.head_width != padded_width(c.D) || !rule_may_choose(build.rule, options))
            continue;
        const int keys = build.tile_n, past = (keys - c.Tk % keys) % keys;
        if (found.build == kAnyGpu ||
            (dense && keys > kFwdBuilds[found.build].tile_n && past <= c.Tk / 16))
            found.build = i;
    }
    return found;
}

}  // namespace

std::vector<Build> attention_fwd_builds() { return {kFwdBuilds.begin(), kFwdBuilds.end()}; }

Choice choose_attention_fwd(DType dtype, const AttentionFwd& p, int build, int device) {
    const AttentionCall& c = p.call;
    const bool options = !scores_are_plain(c);
    return choose(
        kFwdSm90Name, kFwdBuilds, c, build, device, [&] { return refuses(dtype, p); },
        [&](int number) {
            return build_refuses(kFwdBuilds[number], dtype, options, padded_width(c.D));
        },
        [&] { return by_rule(c, options); });
}

void launch_attention_fwd_sm90(DType dtype, const AttentionFwd& p, int build, Stream stream) {
    dispatch_width(p.call.D, [&](auto width) {
        if (dtype == DType::bf16)
            launch_attention_fwd_sm90_of<__nv_bfloat16, width>(p, build, stream);
        else
            launch_attention_fwd_sm90_of<__half, width>(p, build, stream);
    });
}

}  // namespace gk
