// Attention backward, dq in one dtype, for heads of every width; see attention/bwd/queries.h.
#include "attention/bwd/queries.h"

namespace gk {

template void launch_attention_bwd_queries<TypeOf<DType::GK_DTYPE>>(const BwdArguments&, Stream);

}  // namespace gk
