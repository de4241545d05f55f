// Decoding in fp16, for every width of a head; see attention_decode_kernel.h.
#include "attention_decode_kernel.h"

namespace gk {

template int launch_attention_decode_of<__half>(const DecodeArguments&, Stream);

}  // namespace gk
