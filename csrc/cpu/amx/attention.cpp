// Attention in bfloat16 by AMX's tiles; other dtypes are left to v4_bf16. Only this file is compiled
// with AMX's flags, and nothing in it runs before dispatch.cpp has asked the CPU and the system.
#include "cpu/amx/product.h"
#include "cpu/attention/bwd_mask.h"
#include "cpu/attention/fwd.h"
#include "cpu/kernels.h"

namespace gk::cpu {
namespace v4_bf16 {
extern const Kernels kernels;
}

namespace GK_ISA {

static const Kernels& others() { return v4_bf16::kernels; }

void attention_fwd(const AttentionFwd& p, const AttentionItem& item, void* scratch) {
    if (p.call.dtype != DType::bfloat16) return others().attention_fwd(p, item, scratch);
    Forward<TileProducts>(p, scratch).run(item);
}

void attention_bwd(const AttentionBwd& p, const BackwardItem& item, void* scratch) {
    if (p.call.dtype != DType::bfloat16) return others().attention_bwd(p, item, scratch);
    Backward<TileProducts>(p, scratch).run(item);
}

void attention_mask_bwd(const AttentionBwd& p, const MaskItem& item, void* scratch) {
    if (p.call.dtype != DType::bfloat16) return others().attention_mask_bwd(p, item, scratch);
    MaskGradient<TileProducts>{Backward<TileProducts>(p, scratch)}.run(item);
}

int64_t attention_fwd_scratch(const AttentionFwd& p) {
    if (p.call.dtype != DType::bfloat16) return others().attention_fwd_scratch(p);
    return Forward<TileProducts>(p, nullptr).room.used();
}

int64_t attention_bwd_scratch(const AttentionBwd& p) {
    if (p.call.dtype != DType::bfloat16) return others().attention_bwd_scratch(p);
    return Backward<TileProducts>(p, nullptr).room.used();
}

}  // namespace GK_ISA
}  // namespace gk::cpu
