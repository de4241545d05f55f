// The driver's functions. The module does not link the driver's library, so a machine without a
// driver can import it too.
#pragma once

#include <cuda_runtime.h>

#include <string>

namespace gk {

// Why a call of the CUDA runtime failed, for the end of a sentence. Clears the error, which the
// next call would report again.
std::string reason_of(cudaError_t status);

namespace detail {
void* driver_function(const char* name, unsigned since);
}  // namespace detail

// The function of this name, as it is since a version of CUDA (12000: 12.0). Throws Error.
template <class Function>
Function driver_function(const char* name, unsigned since) {
    return reinterpret_cast<Function>(detail::driver_function(name, since));
}

}  // namespace gk
