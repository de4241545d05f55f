// Attention forward on Hopper, for the launcher in attention/fwd/launch.cu.
#pragma once

#include "attention/params.h"
#include "runtime/choose.h"

namespace gk {

constexpr const char* kFwdSm90Name = "attention_fwd_sm90_kernel";

// Throws Error where the caller asks for a build that cannot run.
Choice choose_attention_fwd(DType dtype, const AttentionFwd& p, int build, int device);

// build: the number of the build that was chosen.
void launch_attention_fwd_sm90(DType dtype, const AttentionFwd& p, int build, Stream stream);

}  // namespace gk
