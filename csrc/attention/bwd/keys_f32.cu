// Attention backward, dk and dv in fp32, for every width of a head; see attention/bwd/keys.h.
#include "runtime/launch.h"

#include "attention/bwd/keys.h"

namespace gk {

template void launch_attention_bwd_keys<float>(const BwdArguments&, Stream);

}  // namespace gk
