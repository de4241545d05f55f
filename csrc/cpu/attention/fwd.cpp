// Attention forward in vectors.
#include "cpu/attention/fwd.h"

#include "cpu/kernels.h"

namespace gk::cpu::GK_ISA {

void attention_fwd(const AttentionFwd& p, const AttentionItem& item, void* scratch) {
    with_products(p.call.dtype, [&](auto products) {
        Forward<decltype(products)>(p, scratch).run(item);
    });
}

int64_t attention_fwd_scratch(const AttentionFwd& p) {
    int64_t bytes = 0;
    with_products(p.call.dtype, [&](auto products) {
        bytes = Forward<decltype(products)>(p, nullptr).room.used();
    });
    return bytes;
}

}  // namespace gk::cpu::GK_ISA
