// Attention backward, dk and dv in bf16, for every width of a head; see attention/bwd/keys.h.
#include "runtime/launch.h"

#include "attention/bwd/keys.h"

namespace gk {

template void launch_attention_bwd_keys<__nv_bfloat16>(const BwdArguments&, Stream);

}  // namespace gk
