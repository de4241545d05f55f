// Decoding in fp32, for every width of a head; see attention_decode_kernel.h.
#include "attention_decode_kernel.h"

namespace gk {

template int launch_attention_decode_of<float>(const DecodeArguments&, Stream);

}  // namespace gk
