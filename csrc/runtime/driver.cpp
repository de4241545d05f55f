#include "runtime/driver.h"

#include "runtime/launch.h"

namespace gk {
namespace {

// "13.0" for 13000.
std::string dotted(int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

std::string reason_of(cudaError_t status) {
    cudaGetLastError();
    if (status != cudaErrorInsufficientDriver) return cudaGetErrorString(status);
    int newest = 0;
    cudaDriverGetVersion(&newest);
    if (newest == 0) return "there is no NVIDIA driver";
    return "the kernels were compiled with CUDA " + dotted(CUDART_VERSION) +
           ", and the NVIDIA driver is made for CUDA " + dotted(newest) +
           "; update the driver or compile them with that CUDA";
}

void* detail::driver_function(const char* name, unsigned since) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion(name, &function, since, cudaEnableDefault, &found);
    if (status != cudaSuccess)
        throw Error("the driver could not be asked for its functions: " + reason_of(status));
    if (found != cudaDriverEntryPointSuccess || function == nullptr)
        throw Error("the driver is too old for " + std::string(name) + ": one of CUDA " +
                    dotted(static_cast<int>(since)) + " or newer has it");
    return function;
}

}  // namespace gk
