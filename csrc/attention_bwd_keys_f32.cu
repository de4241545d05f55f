// Attention backward, dk and dv in fp32, for every width of a head; see attention_bwd_keys.h.
#include "launch.h"

#include "attention_bwd_keys.h"

namespace gk {

template void launch_attention_bwd_keys<float>(const BwdArguments&, Stream);

}  // namespace gk
