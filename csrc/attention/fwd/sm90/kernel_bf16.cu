// Attention forward for Hopper in bf16; the formula is in attention/fwd/sm90/kernel.h.
#include "attention/fwd/sm90/kernel.h"

namespace gk {

#define GK_INSTANTIATE(Tiles, options)                                                      \
    template void launch_attention_fwd_sm90_tiles<Tiles<__nv_bfloat16>, options>(           \
        const AttentionFwd&, const Build&, Stream)
GK_INSTANTIATE(Fwd64, false);
GK_INSTANTIATE(Fwd96, false);
GK_INSTANTIATE(Fwd128, false);
GK_INSTANTIATE(Fwd128Wide, false);
GK_INSTANTIATE(Fwd192, false);
GK_INSTANTIATE(Fwd256, false);
GK_INSTANTIATE(Fwd64, true);
GK_INSTANTIATE(Fwd96, true);
GK_INSTANTIATE(Fwd128, true);
GK_INSTANTIATE(Fwd192Narrow, true);
GK_INSTANTIATE(Fwd256Narrow, true);
#undef GK_INSTANTIATE

}  // namespace gk
