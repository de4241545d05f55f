// Attention forward's launcher; the formula and the kernel are in attention_fwd_kernel.h, and one
// file of instantiations for each dtype.
#include "launch.h"

#include "attention.h"

namespace gk {

template <class T>
void launch_attention_fwd_of(const AttentionFwd& p, Stream stream);
extern template void launch_attention_fwd_of<float>(const AttentionFwd&, Stream);
extern template void launch_attention_fwd_of<__nv_bfloat16>(const AttentionFwd&, Stream);
extern template void launch_attention_fwd_of<__half>(const AttentionFwd&, Stream);

void launch_attention_fwd(DType dtype, const AttentionFwd& p, Stream stream) {
    dispatch(dtype, [&](auto zero) { launch_attention_fwd_of<decltype(zero)>(p, stream); });
}

}  // namespace gk
