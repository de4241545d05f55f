// Attention backward on Hopper in fp16, heads up to 128 wide; see attention/bwd/sm90/kernel.h.
#include "runtime/launch.h"

#include "attention/bwd/sm90/kernel.h"

namespace gk {

template void launch_attention_bwd_sm90_main<__half, 128>(int, const BwdSm90&, Stream);

}  // namespace gk
