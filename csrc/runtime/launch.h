// How every kernel is launched, natively and in the emulator, and the few types that launchers
// share.
#pragma once

#ifdef GK_EMULATE
#include "emulator/emulator.h"
#else
#include <cuda_runtime.h>
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "runtime/build.h"

namespace gk {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// The C++ type of a dtype.
template <DType kDType>
using TypeOf = std::conditional_t<kDType == DType::f32, float,
                                  std::conditional_t<kDType == DType::bf16, __nv_bfloat16, __half>>;

// Calls f(T{}) with the C++ type of a dtype.
template <class F>
auto dispatch(DType dtype, F&& f) {
    switch (dtype) {
        case DType::bf16: return f(TypeOf<DType::bf16>{});
        case DType::f16: return f(TypeOf<DType::f16>{});
        case DType::f32: break;
    }
    return f(TypeOf<DType::f32>{});
}

// Where a launch goes. The emulator ignores it.
struct Stream {
    int device;
    cudaStream_t handle;
};

struct Launch {
    const char* name;    // of the kernel, for errors
    std::string shape;   // of the problem, for errors: "x (64, 768) bf16"
    dim3 grid;           // only x may pass 65,535
    unsigned threads;    // of a CTA
    size_t shared_bytes; // of the dynamic arena, which is all of the shared memory
    Stream stream;
    unsigned cluster = 1;  // CTAs of a cluster, along x: 1, 2, 4 or 8, which divides the grid's x
    // These members are only for a dry run (runtime/dry_run.h).
    int64_t tiles = 0;  // of work that a persistent grid shares; 0: one for each CTA
    Build built = {};   // the build that runs, where there are several
    double clocks = 0;  // predicted clocks of a multiprocessor; 0: nothing is predicted
};

// What launchers throw: one sentence that names the kernel, the shape and the cause. pybind11 turns
// it into a RuntimeError.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// How many multiprocessors a device has. The emulator has 2, so that small inputs give each
// multiprocessor several rounds of work.
int multiprocessors(int device);
// A device's compute capability, 90 for 9.0. In the emulator, the variable GPTKERNELS_EMULATE_ARCH
// decides: sm80 (the default) or sm90.
int capability(int device);

namespace detail {
// Records the launch in the thread's dry run (runtime/dry_run.h), if it has one. Returns whether
// nothing else is to happen.
bool dry(const Launch& launch);

#ifdef GK_EMULATE
using Invoke = void (*)(void* kernel, const void* params);
void launch(void* kernel, const Launch& launch, Invoke invoke, const void* params);

// Calls the kernel with a copy of the params on the calling thread's own stack, where the thread
// may read them.
template <class Params>
__attribute__((no_sanitize("thread"))) void invoke(void* kernel, const void* params) {
    reinterpret_cast<void (*)(Params)>(kernel)(*static_cast<const Params*>(params));
}
#else
void launch(const void* kernel, const Launch& launch, const void* params);
#endif
}  // namespace detail

// Launches a kernel, asynchronously on the stream; safe while a CUDA graph is captured. Throws
// Error.
template <class Params>
void launch(void (*kernel)(Params), const Launch& launch, const Params& params) {
    if (detail::dry(launch)) return;
#ifdef GK_EMULATE
    detail::launch(reinterpret_cast<void*>(kernel), launch, detail::invoke<Params>, &params);
#else
    detail::launch(reinterpret_cast<const void*>(kernel), launch, &params);
#endif
}

#ifdef GK_EMULATE
inline unsigned char* shared_memory() { return emulator::shared_memory(); }
#else
// All of the CTA's shared memory.
__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(1024) unsigned char arena[];
    return arena;
}
#endif

}  // namespace gk
