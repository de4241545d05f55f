// Launches a case by its name: what tests/emulated.py calls, in the emulator, and on a GPU those
// cases that are right.
#include "cases.h"

#include <cstring>

#include "runtime/context.h"

#define GK_EXPORT extern "C" __attribute__((visibility("default")))

#ifdef GK_EMULATE
#include "emulator/memory/memory.h"

GK_EXPORT void declare(const char* name, const void* begin, size_t bytes, int written) {
    gk::emulator::memory::declare(name, begin, bytes, written != 0);
}

GK_EXPORT void forget() { gk::emulator::memory::forget(); }

static void finish() {}
#else
static void finish() {
    const cudaError_t status = cudaDeviceSynchronize();
    if (status != cudaSuccess) throw gk::Error(cudaGetErrorString(status));
}
#endif

// What the launch and the case get. A map is made of `shape`, if that has a rank.
struct Given {
    unsigned grid[3], cluster, threads;
    size_t shared;
    gk::TensorMapShape shape;
    float *a, *b;
    void* c;
    int at[5], bytes, n, broken;
};

static void launch(const char* name, const Given& given) {
    const NamedCase* found = NamedCase::first;
    while (found != nullptr && std::strcmp(found->name, name) != 0) found = found->next;
    if (found == nullptr) throw gk::Error(std::string("there is no case ") + name);

    Case params{{}, given.a, given.b, given.c, {}, given.bytes, given.n, given.broken};
    if (given.shape.rank > 0) params.map = gk::tensor_map(given.shape);
    std::memcpy(params.at, given.at, sizeof params.at);
    const dim3 grid(given.grid[0], given.grid[1], given.grid[2]);
    gk::launch(found->kernel,
               {name, "a small case", grid, given.threads, given.shared, {0, nullptr}, given.cluster},
               params);
    finish();
}

// 0, or 1 and the error's sentence.
GK_EXPORT int run(const char* name, const Given* given, char* error, size_t error_bytes) {
    try {
        const gk::Context context(0);
        launch(name, *given);
    } catch (const gk::Error& caught) {
        std::strncpy(error, caught.what(), error_bytes - 1);
        return 1;
    }
    return 0;
}

// Likewise for a map alone, on a thread that has no context.
GK_EXPORT int encode(const gk::TensorMapShape* shape, char* error, size_t error_bytes) {
    try {
        gk::tensor_map(*shape);
    } catch (const gk::Error& caught) {
        std::strncpy(error, caught.what(), error_bytes - 1);
        return 1;
    }
    return 0;
}

GK_EXPORT const char* refuses(const gk::TensorMapShape* shape) {
    return gk::tensor_map_refuses(*shape);
}
