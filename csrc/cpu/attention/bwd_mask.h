// The gradient of an added attn_mask: ds before the softcap's derivative, summed over what the mask
// is broadcast to. It has a pass of its own, which computes the weights again: each number of the
// gradient then belongs to one item, which adds to it in a fixed order. delta is summed from the
// weights here: from a rounded out, its error would remain where a mask is broadcast over keys, whose
// ds nearly cancel.
#pragma once

#include "cpu/attention/bwd.h"

namespace gk::cpu::GK_ISA {

template <class P>
struct MaskGradient {
    Backward<P> pass;  // of which the products for dq, dk and dv are left out

    void run(const MaskItem& item) {
        [[maybe_unused]] const typename P::Session session;
        const AttentionCall& c = pass.c;
        for (int64_t b = item.entry; b < item.last_entry; ++b) {
            const Entry e(c, b);
            for (int64_t head = item.head; head < item.last_head; ++head) {
                pass.make_all_ready(e, head / (c.H / c.Hk), item.first, item.last);
                for (int64_t i = item.first; i < item.last; i += kLanes) {
                    pass.count = 0;
                    pass.prepare(e, head, i, item.last);
                    sum_delta(e, b);
                    for (int m = 0; m < pass.n_blocks; ++m) meet(e, b, pass.blocks[m]);
                }
            }
        }
    }

    // delta = sum_j p dp - dlse
    void sum_delta(const Entry& e, int64_t b) {
        const Group& g = pass.groups[0];
        const int64_t row0 =
            (e.batch * pass.c.H + g.head) * pass.c.Tq + e.first_q + g.first;
        Floats sum[kVectors] = {};
        Backward<P>::clear(pass.delta, kLanes);
        for (int m = 0; m < pass.n_blocks; ++m) {
            const Rows r(e, g, pass.blocks[m].first, pass.blocks[m].keys);
            if (r.none()) continue;
            pass.score(e, b, 0, pass.blocks[m], r);
            for (int row = r.first; row < r.last; ++row)
                for (int vector = 0; vector < kVectors; ++vector)
                    sum[vector] += gradient(row, vector);
        }
        for (int vector = 0; vector < kVectors; ++vector)
            store(pass.delta + vector * kWidth, sum[vector]);
        for (int i = 0; i < g.count && pass.p.dlse != nullptr; ++i)
            pass.delta[i] -= pass.p.dlse[row0 + i];
    }

    void meet(const Entry& e, int64_t b, const typename Backward<P>::Block& block) {
        const Group& g = pass.groups[0];
        const Rows r(e, g, block.first, block.keys);
        if (r.none()) return;
        pass.score(e, b, 0, block, r);
        const MaskStrides& by = pass.p.dmask_strides;
        float* to = pass.p.dmask + b * by.batch + g.head * by.head + g.first * by.query +
                    block.first * by.key;
        for (int row = r.first; row < r.last; ++row) {
            Floats sum{};
            alignas(64) float found[kLanes];
            for (int vector = 0; vector < kVectors; ++vector) {
                const Floats ds = gradient(row, vector);
                store(found + vector * kWidth, ds);
                sum += ds;
            }
            if (by.query == 0)
                to[row * by.key] += sum_of_lanes(sum);
            else
                for (int i = 0; i < g.count; ++i) to[i * by.query + row * by.key] += found[i];
        }
    }

    Floats gradient(int row, int vector) const {
        const int lane = vector * kWidth, at = row * kLanes + lane;
        const Floats score = load(pass.s + at);
        const Floats w = pass.scores.weight(score, load(pass.lse + lane));
        Floats dp = load(pass.dp + at);
        if (pass.words != nullptr) dp = pass.dropout.drop(dp, pass.words, row, vector);
        return score == minus_infinity() ? Floats{} : w * (dp - load(pass.delta + lane));
    }
};

}  // namespace gk::cpu::GK_ISA
