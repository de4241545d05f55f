// Decoding in one dtype, for heads of every width; see attention/decode/kernel.h.
#include "attention/decode/kernel.h"

namespace gk {

template int launch_attention_decode_of<TypeOf<DType::GK_DTYPE>>(const DecodeArguments&, Stream);

}  // namespace gk
