// The native side of runtime/context.h. Setting the runtime's device and setting it back would
// instead create a context on the device of before, if nobody had used that one yet.
#include "runtime/context.h"

#include <cudaTypedefs.h>

#include "runtime/driver.h"
#include "runtime/dry_run.h"
#include "runtime/launch.h"

namespace gk {
namespace {

struct Driver {
    PFN_cuCtxGetDevice_v2000 context_device =
        driver_function<PFN_cuCtxGetDevice_v2000>("cuCtxGetDevice", 2000);
    PFN_cuDeviceGet_v2000 device_of = driver_function<PFN_cuDeviceGet_v2000>("cuDeviceGet", 2000);
    PFN_cuDevicePrimaryCtxRetain_v7000 retain =
        driver_function<PFN_cuDevicePrimaryCtxRetain_v7000>("cuDevicePrimaryCtxRetain", 7000);
    PFN_cuDevicePrimaryCtxRelease_v11000 release =
        driver_function<PFN_cuDevicePrimaryCtxRelease_v11000>("cuDevicePrimaryCtxRelease", 11000);
    PFN_cuCtxPushCurrent_v4000 push =
        driver_function<PFN_cuCtxPushCurrent_v4000>("cuCtxPushCurrent", 4000);
    PFN_cuCtxPopCurrent_v4000 pop =
        driver_function<PFN_cuCtxPopCurrent_v4000>("cuCtxPopCurrent", 4000);
};

const Driver& driver() {
    static const Driver functions;
    return functions;
}

}  // namespace

Context::Context(int device) {
    if (DryRun::elsewhere() != nullptr) return;
    const auto check = [device](CUresult result) {
        if (result == CUDA_SUCCESS) return;
        throw Error("device " + std::to_string(device) + " cannot be used: the driver returned " +
                    "error " + std::to_string(result));
    };
    CUdevice wanted, current;
    check(driver().device_of(&wanted, device));
    if (driver().context_device(&current) == CUDA_SUCCESS && current == wanted) return;
    CUcontext primary;
    check(driver().retain(&primary, wanted));
    const CUresult pushed = driver().push(primary);
    if (pushed != CUDA_SUCCESS) driver().release(wanted);
    check(pushed);
    bound_ = true;
    device_ = wanted;
}

Context::~Context() {
    if (!bound_) return;
    CUcontext primary;
    driver().pop(&primary);
    driver().release(device_);
}

}  // namespace gk
