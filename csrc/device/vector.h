// Vectors in registers, and the 16-byte accesses that fill and empty them.
#pragma once

#include "runtime/launch.h"

namespace gk {

// N elements. Aligned as one access of up to 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
    static_assert(((sizeof(T) * N) & (sizeof(T) * N - 1)) == 0, "a power of two of bytes");
    T at[N];
};

// How many elements 16 bytes hold.
template <class T>
constexpr int kPer128 = 16 / static_cast<int>(sizeof(T));

// One 16-byte access to global or shared memory; the address must be a multiple of 16. Plain
// loads of a vector type would not do: g++ splits them, and the emulator could not see that the
// GPU would fault.
template <class T>
__device__ __forceinline__ Pack<T, kPer128<T>> ld128(const T* source) {
    Pack<T, kPer128<T>> pack;
#ifdef GK_EMULATE
    emulator::load_16(&pack, source);
#else
    *reinterpret_cast<uint4*>(&pack) = *reinterpret_cast<const uint4*>(source);
#endif
    return pack;
}

// To global memory. Spelled out, since where an element path stands beside it the compiler makes
// four small stores of one large.
template <class T>
__device__ __forceinline__ void st128(T* target, const Pack<T, kPer128<T>>& pack) {
#ifdef GK_EMULATE
    emulator::store_16(target, &pack);
#else
    const uint4 words = *reinterpret_cast<const uint4*>(&pack);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(
                     __cvta_generic_to_global(target)),
                 "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
#endif
}

template <class T>
__device__ __forceinline__ void st128_shared(T* target, const Pack<T, kPer128<T>>& pack) {
#ifdef GK_EMULATE
    emulator::store_16(target, &pack);
#else
    *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(&pack);
#endif
}

// N neighbouring elements by as many 16-byte accesses as that takes.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* source) {
    static_assert(N % kPer128<T> == 0, "whole 16-byte accesses");
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; i += kPer128<T>)
        *reinterpret_cast<Pack<T, kPer128<T>>*>(pack.at + i) = ld128(source + i);
    return pack;
}

template <int N, class T>
__device__ __forceinline__ void store_pack(T* target, const Pack<T, N>& pack) {
    static_assert(N % kPer128<T> == 0, "whole 16-byte accesses");
#pragma unroll
    for (int i = 0; i < N; i += kPer128<T>)
        st128(target + i, *reinterpret_cast<const Pack<T, kPer128<T>>*>(pack.at + i));
}

// The compiler forgets what it computed from the pack: it is to be unpacked again, instead of held
// unpacked, in twice the registers, until then.
template <class T, int N>
__device__ __forceinline__ void forget(Pack<T, N>& pack) {
#ifndef GK_EMULATE
    static_assert(sizeof(pack) % 4 == 0, "whole registers");
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(pack)) / 4; ++i)
        asm volatile("" : "+r"(reinterpret_cast<uint32_t*>(pack.at)[i]));
#endif
}

// The same where only the first `valid` elements exist, of a row that may not be `aligned` to 16
// bytes: those that do not exist are read as 0 and not written.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_valid(const T* source, int valid, bool aligned) {
    if (aligned && valid >= N) return load_pack<N>(source);
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.at[i] = i < valid ? source[i] : T(0.0f);
    return pack;
}

template <int N, class T>
__device__ __forceinline__ void store_valid(T* target, const Pack<T, N>& pack, int valid,
                                            bool aligned) {
    if (aligned && valid >= N) {
        store_pack<N>(target, pack);
        return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (i < valid) target[i] = pack.at[i];
    }
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// Rounded to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}

// Two at a time: one instruction where two single conversions are three.
template <class T>
__device__ __forceinline__ Pack<T, 2> from_floats(float low, float high);
template <>
__device__ __forceinline__ Pack<float, 2> from_floats<float>(float low, float high) {
    return {{low, high}};
}
template <>
__device__ __forceinline__ Pack<__nv_bfloat16, 2> from_floats<__nv_bfloat16>(float low,
                                                                            float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return {{pair.x, pair.y}};
}
template <>
__device__ __forceinline__ Pack<__half, 2> from_floats<__half>(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return {{pair.x, pair.y}};
}

// Conversions of packs go by the 32-bit registers that hold two 16-bit elements: ptxas would spread
// the elements over a register each.
template <class T>
__device__ __forceinline__ float2 floats_of(uint32_t word);
template <>
__device__ __forceinline__ float2 floats_of<__nv_bfloat16>(uint32_t word) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 floats_of<__half>(uint32_t word) {
    return __half22float2(*reinterpret_cast<const __half2*>(&word));
}

template <class T, int N>
__device__ __forceinline__ Pack<T, N> pack_floats(const float (&values)[N]) {
    Pack<T, N> pack;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            const Pack<T, 2> pair = from_floats<T>(values[2 * i], values[2 * i + 1]);
            reinterpret_cast<uint32_t*>(pack.at)[i] = *reinterpret_cast<const uint32_t*>(&pair);
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) pack.at[i] = values[i];
    }
    return pack;
}

template <class T, int N>
__device__ __forceinline__ void unpack_floats(float (&values)[N], const Pack<T, N>& pack) {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            const float2 pair = floats_of<T>(reinterpret_cast<const uint32_t*>(pack.at)[i]);
            values[2 * i] = pair.x;
            values[2 * i + 1] = pair.y;
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] = pack.at[i];
    }
}

}  // namespace gk
