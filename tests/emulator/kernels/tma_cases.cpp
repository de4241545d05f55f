// Launches a case with a tensor map by its name, for tests/emulator/test_tma.py: in the emulator, and on a GPU
// those cases that are right.
#include "tma_cases.h"

#include <cstring>

#define GK_EXPORT extern "C" __attribute__((visibility("default")))

#ifdef GK_EMULATE
static const NamedBoxCase* const kFiles[] = {kBoxCases, kBoxMistakes};

static void finish() {}
#else
static const NamedBoxCase* const kFiles[] = {kBoxCases};

static void finish() {
    const cudaError_t status = cudaDeviceSynchronize();
    if (status != cudaSuccess) throw gk::Error(cudaGetErrorString(status));
}
#endif

// What the launch and the case get: all but the map, which is made of `shape`.
struct BoxLaunch {
    unsigned grid, threads, cluster;
    size_t shared;
    gk::TensorMapShape shape;
    const void* a;
    void* b;
    int at[5];
    int bytes, n, broken;
};

static void launch(const char* name, const BoxLaunch& given) {
    BoxCase params{};
    if (given.shape.rank > 0) params.map = gk::tensor_map(given.shape);
    params.a = given.a;
    params.b = given.b;
    std::memcpy(params.at, given.at, sizeof params.at);
    params.bytes = given.bytes;
    params.n = given.n;
    params.broken = given.broken;
    for (const NamedBoxCase* cases : kFiles) {
        for (; cases->name != nullptr; ++cases) {
            if (std::strcmp(cases->name, name) != 0) continue;
            gk::launch(cases->kernel,
                       {name, "a small case", dim3(given.grid), given.threads, given.shared,
                        {0, nullptr}, given.cluster},
                       params);
            finish();
            return;
        }
    }
    throw gk::Error(std::string("there is no case ") + name);
}

// 0, or 1 and the error's sentence.
GK_EXPORT int run_box(const char* name, const BoxLaunch* given, char* error, size_t error_bytes) {
    try {
        launch(name, *given);
    } catch (const gk::Error& caught) {
        std::strncpy(error, caught.what(), error_bytes - 1);
        return 1;
    }
    return 0;
}

GK_EXPORT const char* refuses(const gk::TensorMapShape* shape) {
    return gk::tensor_map_refuses(*shape);
}
