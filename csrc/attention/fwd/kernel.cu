// Attention forward in one dtype, for heads of every width; see attention/fwd/kernel.h.
#include "attention/fwd/kernel.h"

namespace gk {

template void launch_attention_fwd_of<TypeOf<DType::GK_DTYPE>>(const AttentionFwd&, Stream);

}  // namespace gk
