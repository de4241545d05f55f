// Small kernels for tests/emulated.py, which finds them by name. `broken` makes what a kernel
// is there to do wrong; without it the same kernel is right.
#pragma once

#include "runtime/tensor_map.h"

struct Case {
    gk::TensorMap map;
    float* a;  // what they point to, each kernel says
    float* b;
    void* c;
    int at[5];  // coordinates of a box of the map's tensor
    int bytes;  // of the box
    int n;
    int broken;
};

// A kernel and its name, in the list of all. One with template parameters, or with two names, is
// named by hand, others by GK_CASE.
struct NamedCase {
    NamedCase(const char* name, void (*kernel)(const Case))
        : name(name), kernel(kernel), next(first) {
        first = this;
    }
    NamedCase(const NamedCase&) = delete;

    const char* name;
    void (*kernel)(const Case);
    const NamedCase* next;
    inline static const NamedCase* first = nullptr;
};

// Begins a kernel with the parameter p, which is found by its name.
#define GK_CASE(name)                                     \
    __global__ void name(const __grid_constant__ Case p); \
    const NamedCase name##_case(#name, name);             \
    __global__ void name(const __grid_constant__ Case p)

// Shared memory as most kernels use it.
inline __device__ float* arena() { return reinterpret_cast<float*>(gk::shared_memory()); }
