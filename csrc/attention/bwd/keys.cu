// Attention backward, dk and dv in one dtype, for heads of every width; see attention/bwd/keys.h.
#include "attention/bwd/keys.h"

namespace gk {

template void launch_attention_bwd_keys<TypeOf<DType::GK_DTYPE>>(const BwdArguments&, Stream);

}  // namespace gk
