// The address of something in shared memory as instructions take it: 32 bits, within the window.
#pragma once

#include "runtime/launch.h"

namespace gk {

#ifndef GK_EMULATE
__device__ inline unsigned shared_address(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}
#endif

}  // namespace gk
