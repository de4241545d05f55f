// The native side of runtime/launch.h: opt-in to large shared memory, launch, check.
#include "runtime/launch.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <map>
#include <mutex>
#include <tuple>

#include "runtime/driver.h"
#include "runtime/dry_run.h"
#include "runtime/resident.h"

namespace gk {
namespace {

constexpr int kMaxDevices = 64;
// The shared memory that a CTA gets without opting in. A launch that needs more opts in first.
// Opting in sets an attribute of the kernel and puts nothing on the stream, so it is allowed while
// a graph is captured.
constexpr size_t kSharedWithoutOptIn = 48 * 1024;

void check(cudaError_t status, const Launch& launch, const char* doing) {
    if (status == cudaSuccess) return;
    throw Error(std::string(launch.name) + " on " + launch.shape + " failed " + doing + ": " +
                reason_of(status));
}

// A positive number for each device, or 0 while the device has not been asked for it.
using Known = std::array<std::atomic<int>, kMaxDevices>;

template <class Ask>
int remembered(Known& known, int device, const char* what, Ask&& ask) {
    if (device < 0 || device >= kMaxDevices) {
        throw Error("device " + std::to_string(device) + " is not one of the first " +
                    std::to_string(kMaxDevices));
    }
    int number = known[device].load(std::memory_order_relaxed);
    if (number == 0) {
        const cudaError_t status = ask(&number, device);
        if (status != cudaSuccess) {
            throw Error(std::string(what) + " of device " + std::to_string(device) +
                        " could not be found: " + reason_of(status));
        }
        known[device].store(number, std::memory_order_relaxed);
    }
    return number;
}

}  // namespace

int multiprocessors(int device) {
    if (const DryRun* run = DryRun::elsewhere()) return run->multiprocessors;
    static Known known{};
    return remembered(known, device, "the multiprocessors", [](int* count, int number) {
        return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, number);
    });
}

int capability(int device) {
    if (const DryRun* run = DryRun::elsewhere()) return run->capability;
    static Known known{};
    return remembered(known, device, "the compute capability", [](int* capability, int number) {
        int major = 0, minor = 0;
        cudaError_t status =
            cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, number);
        if (status == cudaSuccess) {
            status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, number);
        }
        *capability = 10 * major + minor;
        return status;
    });
}

namespace {

// The launch as the CUDA runtime takes it. `cluster` must outlive the configuration.
cudaLaunchConfig_t configuration(const Launch& launch, cudaLaunchAttribute& cluster) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = launch.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = launch.grid;
    config.blockDim = dim3(launch.threads);
    config.dynamicSmemBytes = launch.shared_bytes;
    config.stream = launch.stream.handle;
    config.attrs = &cluster;
    // GPUs before Hopper do not know the attribute.
    config.numAttrs = launch.cluster > 1 ? 1 : 0;
    return config;
}

void opt_in_to_shared(const void* kernel, const Launch& launch) {
    if (launch.shared_bytes <= kSharedWithoutOptIn) return;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(launch.shared_bytes)),
          launch, "to get its shared memory");
}

}  // namespace

int detail::resident_clusters(const void* kernel, const Launch& launch, int ctas_of_sm) {
    if (const DryRun* run = DryRun::elsewhere())
        return std::max(1, run->multiprocessors * ctas_of_sm / static_cast<int>(launch.cluster));
    // The driver computes this at every call, though it never changes.
    static std::mutex mutex;
    static std::map<std::tuple<const void*, int, unsigned, unsigned, size_t>, int> known;
    const std::lock_guard lock(mutex);
    int& clusters = known[{kernel, launch.stream.device, launch.cluster, launch.threads,
                           launch.shared_bytes}];
    if (clusters > 0) return clusters;
    opt_in_to_shared(kernel, launch);
    cudaLaunchAttribute cluster{};
    Launch one = launch;
    one.grid = dim3(launch.cluster);
    const cudaLaunchConfig_t config = configuration(one, cluster);
    check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), launch,
          "to count the clusters that run at a time");
    if (clusters == 0)
        throw Error(std::string(launch.name) + " on " + launch.shape + ": no cluster of " +
                    std::to_string(launch.cluster) + " CTAs fits on this device");
    return clusters;
}

void detail::launch(const void* kernel, const Launch& launch, const void* params) {
    opt_in_to_shared(kernel, launch);
    void* arguments[] = {const_cast<void*>(params)};
    cudaLaunchAttribute cluster{};
    const cudaLaunchConfig_t config = configuration(launch, cluster);
    check(cudaLaunchKernelExC(&config, kernel, arguments), launch, "to launch");
}

}  // namespace gk
