// Attention backward on Hopper, the main kernel's builds for one dtype and head width; see
// attention/bwd/sm90/kernel.h.
#include "attention/bwd/sm90/kernel.h"

namespace gk {

template void launch_attention_bwd_sm90_main<TypeOf<DType::GK_DTYPE>, GK_WIDTH>(const BwdSm90&, int,
                                                                                Stream);

}  // namespace gk
