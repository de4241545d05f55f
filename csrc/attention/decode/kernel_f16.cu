// Decoding in fp16, for every width of a head; see attention/decode/kernel.h.
#include "attention/decode/kernel.h"

namespace gk {

template int launch_attention_decode_of<__half>(const DecodeArguments&, Stream);

}  // namespace gk
