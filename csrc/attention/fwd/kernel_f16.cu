// Attention forward in fp16, for every width of a head; see attention/fwd/kernel.h.
#include "runtime/launch.h"

#include "attention/fwd/kernel.h"

namespace gk {

template void launch_attention_fwd_of<__half>(const AttentionFwd&, Stream);

}  // namespace gk
