// Attention backward in vectors.
#include "cpu/attention/bwd_mask.h"
#include "cpu/kernels.h"

namespace gk::cpu::GK_ISA {

void attention_bwd(const AttentionBwd& p, const BackwardItem& item, void* scratch) {
    with_products(p.call.dtype, [&](auto products) {
        Backward<decltype(products)>(p, scratch).run(item);
    });
}

void attention_mask_bwd(const AttentionBwd& p, const MaskItem& item, void* scratch) {
    with_products(p.call.dtype, [&](auto products) {
        using P = decltype(products);
        MaskGradient<P>{Backward<P>(p, scratch)}.run(item);
    });
}

int64_t attention_bwd_scratch(const AttentionBwd& p) {
    int64_t bytes = 0;
    with_products(p.call.dtype, [&](auto products) {
        bytes = Backward<decltype(products)>(p, nullptr).room.used();
    });
    return bytes;
}

}  // namespace gk::cpu::GK_ISA
