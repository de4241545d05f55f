// Attention backward, dq in fp16, for every width of a head; see attention_bwd_queries.h.
#include "launch.h"

#include "attention_bwd_queries.h"

namespace gk {

template void launch_attention_bwd_queries<__half>(const BwdArguments&, Stream);

}  // namespace gk
