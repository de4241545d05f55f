// Attention forward in bf16, for every width of a head; see attention/fwd/kernel.h.
#include "runtime/launch.h"

#include "attention/fwd/kernel.h"

namespace gk {

template void launch_attention_fwd_of<__nv_bfloat16>(const AttentionFwd&, Stream);

}  // namespace gk
