// Two devices, and as much of a driver as csrc/runtime/context.cpp and driver.cpp ask for: for
// test_context.py.
#include <cudaTypedefs.h>

#include <cstring>
#include <vector>

#include "runtime/context.h"
#include "runtime/driver.h"
#include "runtime/launch.h"

#define GK_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

int version, users[2];     // users: of each device's primary context, which exists if it has any
std::vector<int> current;  // the thread's contexts, each the number of its device

CUcontext context_of(int device) { return reinterpret_cast<CUcontext>(device + 1); }

CUresult context_device(CUdevice* device) {
    if (current.empty()) return CUDA_ERROR_INVALID_CONTEXT;
    *device = current.back();
    return CUDA_SUCCESS;
}
CUresult device_of(CUdevice* device, int ordinal) {
    *device = ordinal;
    return ordinal < 2 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
CUresult retain(CUcontext* context, CUdevice device) {
    ++users[device];
    *context = context_of(device);
    return CUDA_SUCCESS;
}
CUresult release(CUdevice device) {
    --users[device];
    return CUDA_SUCCESS;
}
CUresult push(CUcontext context) {
    current.push_back(context == context_of(1));
    return CUDA_SUCCESS;
}
CUresult pop(CUcontext* context) {
    *context = context_of(current.back());
    current.pop_back();
    return CUDA_SUCCESS;
}

struct {
    const char* name;
    void* function;
} const kFunctions[] = {
    {"cuCtxGetDevice", reinterpret_cast<void*>(context_device)},
    {"cuDeviceGet", reinterpret_cast<void*>(device_of)},
    {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(retain)},
    {"cuDevicePrimaryCtxRelease", reinterpret_cast<void*>(release)},
    {"cuCtxPushCurrent", reinterpret_cast<void*>(push)},
    {"cuCtxPopCurrent", reinterpret_cast<void*>(pop)},
};

}  // namespace

extern "C" {

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "another error"; }
cudaError_t cudaDriverGetVersion(int* found) {
    *found = version;
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
    if (version < CUDART_VERSION) return cudaErrorInsufficientDriver;
    for (const auto& known : kFunctions)
        if (std::strcmp(name, known.name) == 0) *function = known.function;
    *found = *function != nullptr ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

}  // extern "C"

// The thread is on device `now`, or on none if -1.
GK_EXPORT void begin(int now, int users0, int users1) {
    version = CUDART_VERSION;
    current.clear();
    if (now >= 0) current.push_back(now);
    users[0] = users0;
    users[1] = users1;
}

// The thread's device, or -1, and how many users each primary context has.
GK_EXPORT void state(int* found) {
    found[0] = current.empty() ? -1 : current.back();
    found[1] = users[0];
    found[2] = users[1];
}

// Binds a device and gives the state in between; 1 with an error's sentence.
GK_EXPORT int bind_device(int device, int* found, char* error, size_t error_bytes) {
    try {
        const gk::Context context(device);
        state(found);
    } catch (const gk::Error& caught) {
        std::strncpy(error, caught.what(), error_bytes - 1);
        return 1;
    }
    return 0;
}

GK_EXPORT int compiled_with() { return CUDART_VERSION; }

// Why a driver of this version (0: none; -1: of this CUDA) does not have a function.
GK_EXPORT void lacks(int driver, const char* name, char* error, size_t error_bytes) {
    version = driver >= 0 ? driver : CUDART_VERSION;
    try {
        gk::driver_function<void*>(name, 12000);
    } catch (const gk::Error& caught) {
        std::strncpy(error, caught.what(), error_bytes - 1);
    }
}
