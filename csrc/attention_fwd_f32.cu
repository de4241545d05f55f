// Attention forward in fp32, for every width of a head; see attention_fwd_kernel.h.
#include "launch.h"

#include "attention_fwd_kernel.h"

namespace gk {

template void launch_attention_fwd_of<float>(const AttentionFwd&, Stream);

}  // namespace gk
