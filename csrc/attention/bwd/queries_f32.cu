// Attention backward, dq in fp32, for every width of a head; see attention/bwd/queries.h.
#include "runtime/launch.h"

#include "attention/bwd/queries.h"

namespace gk {

template void launch_attention_bwd_queries<float>(const BwdArguments&, Stream);

}  // namespace gk
