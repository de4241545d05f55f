// Attention forward's launcher. The formula and the kernel of every device are in
// attention/fwd/kernel.h, with one file of instantiations for each dtype; the kernel of compute
// capability 9.0 is in attention/fwd/sm90/kernel.h.
#include "attention/params.h"
#include "runtime/launch.h"
#include "runtime/dry_run.h"

namespace gk {

template <class T>
void launch_attention_fwd_of(const AttentionFwd& p, Stream stream);
extern template void launch_attention_fwd_of<float>(const AttentionFwd&, Stream);
extern template void launch_attention_fwd_of<__nv_bfloat16>(const AttentionFwd&, Stream);
extern template void launch_attention_fwd_of<__half>(const AttentionFwd&, Stream);

void launch_attention_fwd(DType dtype, const AttentionFwd& p, Stream stream, int build) {
    const bool hopper = capability(stream.device) == 90;
    const std::string reason = !hopper ? "the device is not of compute capability 9.0"
                                       : attention_fwd_sm90_refuses(dtype, p);
    if (reason.empty()) return launch_attention_fwd_sm90(dtype, p, stream, build);
    if (build >= 0)
        throw Error("attention_fwd_sm90_kernel on " + shape_of(p.call) + ": " + reason);
    if (hopper) dry_run_refused("attention_fwd_sm90_kernel", reason);
    dispatch(dtype, [&](auto zero) { launch_attention_fwd_of<decltype(zero)>(p, stream); });
}

}  // namespace gk
