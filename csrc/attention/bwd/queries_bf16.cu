// Attention backward, dq in bf16, for every width of a head; see attention/bwd/queries.h.
#include "runtime/launch.h"

#include "attention/bwd/queries.h"

namespace gk {

template void launch_attention_bwd_queries<__nv_bfloat16>(const BwdArguments&, Stream);

}  // namespace gk
