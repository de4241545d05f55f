// The gradient of an added attn_mask: ds before the softcap's derivative, summed over what the mask
// is broadcast to. It has a pass of its own, which computes the weights again: each number of the
// gradient then belongs to one item, which adds to it in a fixed order. delta is summed from the
// weights here: from a rounded out, its error would remain where a mask is broadcast over keys,
// whose ds nearly cancel.
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
                if (head == item.head || head % (c.H / c.Hk) == 0)
                    pass.find_blocks(e, head / (c.H / c.Hk), item.first, item.last, 0, e.Tk);
                for (int64_t i = item.first; i < item.last; i += kLanes) {
                    pass.count = 0;
                    pass.prepare(e, head, i, item.last);
                    pass.sum_again(e, b, 0);
                    for (int m = 0; m < pass.n_blocks; ++m) meet(e, b, pass.blocks[m]);
                }
            }
        }
    }

    void meet(const Entry& e, int64_t b, typename Backward<P>::Block& block) {
        const Group& g = pass.groups[0];
        const Rows r(e, g, block.first, block.keys);
        if (r.none()) return;
        if (!pass.score(e, b, 0, block, r)) return;
        const MaskStrides& by = pass.p.dmask_strides;
        float* to = pass.p.dmask + b * by.batch + g.head * by.head + g.first * by.query +
                    block.first * by.key;
        for (int row = r.first; row < r.last; ++row) {
            Floats sum{};
            alignas(64) float found[kLanes];
            for (int vector = 0; vector < kVectors; ++vector) {
                const Floats w = pass.weight(0, row, vector);
                const Floats difference =
                    pass.upper(row, vector) - load(pass.delta + vector * kWidth);
                const Floats ds = w == 0.0f ? Floats{} : w * difference;
                store(found + vector * kWidth, ds);
                sum += ds;
            }
            if (by.query == 0)
                to[row * by.key] += sum_of_lanes(sum);
            else
                for (int i = 0; i < g.count; ++i) to[i * by.query + row * by.key] += found[i];
        }
    }
};

}  // namespace gk::cpu::GK_ISA
