// CUDA C++ for a CPU: what a kernel finds here in place of nvcc's threads, barriers, shuffles,
// votes, atomics and device functions. Layouts and rules are those of the PTX ISA.
#pragma once

#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstring>

// g++ reports all accesses within one function, but not those of a call that takes or returns a
// struct in memory. So everything that a kernel calls is inlined, CUDA's own conversions too.
#undef __device__
#define __device__ __attribute__((always_inline))
#define unused always_inline, unused
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#undef unused

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

namespace gk::emulator {

uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();
unsigned char* shared_memory();

// Barrier `number` of the CTA. For `threads` threads it takes whole warps, and all lanes of a warp
// must come from one place; for 0 it takes all threads that have not returned.
void barrier_sync(unsigned number, unsigned threads, const char* what);
// Counts as arrived at such a barrier, for a number of threads, and goes on.
void barrier_arrive(unsigned number, unsigned threads);

// The lanes named by `mask` meet at one place, by one path of calls. The last lane to arrive calls
// `combine` with the data of all lanes, indexed by lane, nullptr for absent lanes; then all go on.
// Lanes that have returned need not come, except to instructions for a `whole` warp.
using Combine = void (*)(void* const* lanes);
void collective(const char* what, unsigned mask, void* data, Combine combine, bool whole = false);

enum class Shuffle { index, up, down, exclusive };
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int operand, int width);
unsigned ballot(const char* what, unsigned mask, bool predicate);
void warp_sync(unsigned mask);

float atomic_add(float* address, float value);

// One 16-byte access to global or shared memory, checked as one: g++ would divide it.
void load_16(void* to, const void* from);
void store_16(void* to, const void* from);

template <class T>
__attribute__((no_sanitize("thread"))) T shuffle_as(Shuffle kind, unsigned mask, T value,
                                                    int operand, int width) {
    static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = shuffle(kind, mask, bits, operand, width);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

}  // namespace gk::emulator

#define threadIdx (::gk::emulator::thread_index())
#define blockIdx (::gk::emulator::block_index())
#define blockDim (::gk::emulator::block_size())
#define gridDim (::gk::emulator::grid_size())

// CUDA's own names, as kernels write them.
inline void __syncthreads() {
    gk::emulator::barrier_sync(0, 0, "__syncthreads");
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
    gk::emulator::warp_sync(mask);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
    using gk::emulator::Shuffle;
    return gk::emulator::shuffle_as(Shuffle::index, mask, value, lane, width);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    using gk::emulator::Shuffle;
    return gk::emulator::shuffle_as(Shuffle::up, mask, value, int(delta), width);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    using gk::emulator::Shuffle;
    return gk::emulator::shuffle_as(Shuffle::down, mask, value, int(delta), width);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    using gk::emulator::Shuffle;
    return gk::emulator::shuffle_as(Shuffle::exclusive, mask, value, lanes, width);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return gk::emulator::ballot("__ballot_sync", mask, predicate != 0);
}

inline int __any_sync(unsigned mask, int predicate) {
    return gk::emulator::ballot("__any_sync", mask, predicate != 0) != 0;
}

inline int __all_sync(unsigned mask, int predicate) {
    return gk::emulator::ballot("__all_sync", mask, predicate == 0) == 0;
}

inline float atomicAdd(float* address, float value) {
    return gk::emulator::atomic_add(address, value);
}

template <class T>
T __ldg(const T* address) {
    return *address;
}

inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }

template <class T>
constexpr T min(T a, T b) {
    return b < a ? b : a;
}

template <class T>
constexpr T max(T a, T b) {
    return a < b ? b : a;
}

// As in CUDA: of a NaN and a number, the number is returned.
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
