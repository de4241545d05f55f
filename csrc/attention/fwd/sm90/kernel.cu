// Attention forward on Hopper, the builds for one dtype and head width; see
// attention/fwd/sm90/kernel.h.
#include "attention/fwd/sm90/kernel.h"

namespace gk {

template void launch_attention_fwd_sm90_of<TypeOf<DType::GK_DTYPE>, GK_WIDTH>(const AttentionFwd&,
                                                                              int, Stream);

}  // namespace gk
