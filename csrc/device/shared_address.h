// The address of something in shared memory as PTX instructions take it: a 32-bit offset into the
// shared window.
#pragma once

#include "runtime/launch.h"

namespace gk {

#ifndef GK_EMULATE
__device__ inline unsigned shared_address(const void* shared) {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}
#endif

}  // namespace gk
