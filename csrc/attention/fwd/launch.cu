// Attention forward's launcher. The formula and the kernel for any GPU are in
// attention/fwd/kernel.h, the kernel for Hopper is in attention/fwd/sm90/kernel.h.
#include "attention/fwd/sm90/launch.h"
#include "runtime/dry_run.h"

namespace gk {

// Each T is compiled in a translation unit of its own.
template <class T>
void launch_attention_fwd_of(const AttentionFwd& p, Stream stream);

void launch_attention_fwd(DType dtype, const AttentionFwd& p, int build, Stream stream) {
    const Choice choice = choose_attention_fwd(dtype, p, build, stream.device);
    if (choice.build != kAnyGpu) return launch_attention_fwd_sm90(dtype, p, choice.build, stream);
    dry_run_refused(kFwdSm90Name, choice.reason);
    dispatch(dtype, [&](auto zero) { launch_attention_fwd_of<decltype(zero)>(p, stream); });
}

}  // namespace gk
