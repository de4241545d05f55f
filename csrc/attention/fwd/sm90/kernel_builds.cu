// Attention forward for Hopper, ways to build it that tuning compares with the rule's choices; the
// formula is in attention/fwd/sm90/kernel.h.
#include "attention/fwd/sm90/kernel.h"

namespace gk {

#define GK_INSTANTIATE(Tiles, options)                                                      \
    template void launch_attention_fwd_sm90_tiles<Tiles<__nv_bfloat16>, options>(           \
        const AttentionFwd&, const Build&, Stream)
GK_INSTANTIATE(Fwd64Apart, false);
GK_INSTANTIATE(Fwd64Low, false);
GK_INSTANTIATE(Fwd64Wide, false);
GK_INSTANTIATE(Fwd96High, false);
GK_INSTANTIATE(Fwd128Apart, false);
GK_INSTANTIATE(Fwd128High, false);
GK_INSTANTIATE(Fwd192Narrow, false);
GK_INSTANTIATE(Fwd256Narrow, false);
#undef GK_INSTANTIATE

}  // namespace gk
