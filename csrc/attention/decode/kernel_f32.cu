// Decoding in fp32, for every width of a head; see attention/decode/kernel.h.
#include "attention/decode/kernel.h"

namespace gk {

template int launch_attention_decode_of<float>(const DecodeArguments&, Stream);

}  // namespace gk
