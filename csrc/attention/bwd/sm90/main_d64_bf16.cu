// Attention backward on Hopper in bf16, heads up to 64 wide; see attention/bwd/sm90/kernel.h.
#include "runtime/launch.h"

#include "attention/bwd/sm90/kernel.h"

namespace gk {

template void launch_attention_bwd_sm90_main<__nv_bfloat16, 64>(int, const BwdSm90&, Stream);

}  // namespace gk
