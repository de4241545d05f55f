// The kernels of the instruction set that this file is compiled for.
#include "cpu/kernels.h"

#define GK_NAME_OF(isa) #isa
#define GK_NAME(isa) GK_NAME_OF(isa)

namespace gk::cpu::GK_ISA {

extern const Kernels kernels;
const Kernels kernels = {
    GK_NAME(GK_ISA), widen, round, add_rows, layer_norm_fwd, layer_norm_bwd, gelu_fwd, gelu_bwd,
    cross_entropy, accumulate,
    linear_scratch, linear_ready, linear,
    attention_fwd, attention_bwd, attention_mask_bwd, attention_fwd_scratch, attention_bwd_scratch,
    elementwise_keep, attention_keep, attention_decode, attention_decode_combine,
};

}  // namespace gk::cpu::GK_ISA
