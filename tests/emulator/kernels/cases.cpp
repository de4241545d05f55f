// Launches a case by its name: what tests/emulated.py calls, in the emulator, and on a GPU those
// cases that are right.
#include "cases.h"

#include <cstring>

#define GK_EXPORT extern "C" __attribute__((visibility("default")))

#ifdef GK_EMULATE
#include "emulator/memory/memory.h"

static const NamedCase* const kFiles[] = {kMemoryCases,    kRaceCases, kCopyCases,   kMeetingCases,
                                          kPrimitiveCases, kTileCases, kDropoutCases,
                                          kWgmmaCases,     kMbarrierCases, kClusterCases};

GK_EXPORT void declare(const char* name, const void* begin, size_t bytes, int written) {
    gk::emulator::memory::declare(name, begin, bytes, written != 0);
}

GK_EXPORT void forget() { gk::emulator::memory::forget(); }

static void finish() {}
#else
static const NamedCase* const kFiles[] = {kPrimitiveCases, kTileCases,     kDropoutCases,
                                          kWgmmaCases,     kMbarrierCases, kClusterCases};

static void finish() {
    const cudaError_t status = cudaDeviceSynchronize();
    if (status != cudaSuccess) throw gk::Error(cudaGetErrorString(status));
}
#endif

// 0, or 1 and the error's sentence.
GK_EXPORT int run(const char* name, const unsigned (&grid)[3], unsigned cluster, unsigned threads,
                  size_t shared, const Case* params, char* error, size_t error_bytes) {
    try {
        for (const NamedCase* cases : kFiles) {
            for (; cases->name != nullptr; ++cases) {
                if (std::strcmp(cases->name, name) != 0) continue;
                gk::launch(cases->kernel,
                           {name, "a small case", dim3(grid[0], grid[1], grid[2]), threads, shared,
                            {0, nullptr}, cluster},
                           *params);
                finish();
                return 0;
            }
        }
        throw gk::Error(std::string("there is no case ") + name);
    } catch (const gk::Error& caught) {
        std::strncpy(error, caught.what(), error_bytes - 1);
        return 1;
    }
}
