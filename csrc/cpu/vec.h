// Vectors of the instruction set that a kernel file is compiled for, in the vector extensions of
// GCC and Clang: kWidth numbers of fp32, with loads and stores that widen and round bf16 and fp16.
//
// Each kernel file is compiled once for each instruction set, with -DGK_ISA=<its name>, and all of
// it lies in the namespace gk::cpu::GK_ISA. Nothing here is shared between the objects: the linker
// would keep one version, and a CPU without AVX-512 could run the one for AVX-512. So kernel files
// use no inline function from outside the namespace and nothing of the standard library.
//
// Intel's intrinsics stand here alone, where GCC's code for a conversion or a product is slow.
#pragma once

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/dtype.h"

namespace gk::cpu::GK_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
typedef uint64_t Longs __attribute__((vector_size(4 * kWidth)));
constexpr int kLongs = kWidth / 2;

// The same in memory, at any address.
typedef float FloatsThere __attribute__((vector_size(4 * kWidth), aligned(1), may_alias));
typedef uint16_t HalvesThere __attribute__((vector_size(2 * kWidth), aligned(1), may_alias));
typedef uint64_t LongsThere __attribute__((vector_size(4 * kWidth), aligned(1), may_alias));
typedef uint32_t WordsThere __attribute__((vector_size(4 * kWidth), aligned(1), may_alias));

static inline Floats all(float x) { return x - Floats{}; }
static inline Words as_words(Floats x) { return reinterpret_cast<Words>(x); }
static inline Floats as_floats(Words x) { return reinterpret_cast<Floats>(x); }

// a b + c, rounded once where the instruction set can.
static inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_fmadd_ps(
        reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
    return reinterpret_cast<Floats>(_mm256_fmadd_ps(
        reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
    return a * b + c;
#endif
}
static inline Floats multiply_add(Floats a, Floats b, float c) {
    return multiply_add(a, b, all(c));
}
static inline Floats multiply_add(Floats a, float b, Floats c) {
    return multiply_add(a, all(b), c);
}
static inline Floats multiply_add(Floats a, float b, float c) {
    return multiply_add(a, all(b), all(c));
}

// The larger of two numbers, b where one is NaN.
static inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(
        _mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#else
    return a > b ? a : b;
#endif
}

// Whether any lane is not a finite number.
static inline bool any_nonfinite(Floats x) {
    const Words size = as_words(x) & 0x7f800000;
#if defined(__AVX512F__)
    return _mm512_cmpeq_epi32_mask(reinterpret_cast<__m512i>(size),
                                   _mm512_set1_epi32(0x7f800000)) != 0;
#else
    const Ints found = size == 0x7f800000;
    int any = 0;
    for (int i = 0; i < kWidth; ++i) any |= found[i];
    return any != 0;
#endif
}

static inline bool any_bit(Words x) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(x)) != 0;
#else
    uint32_t any = 0;
    for (int i = 0; i < kWidth; ++i) any |= x[i];
    return any != 0;
#endif
}

static inline bool all_ones(Floats x) {
#if defined(__AVX512F__)
    return _mm512_cmpneq_ps_mask(reinterpret_cast<__m512>(x), _mm512_set1_ps(1.0f)) == 0;
#else
    const Ints other = x != 1.0f;
    int any = 0;
    for (int i = 0; i < kWidth; ++i) any |= other[i];
    return any == 0;
#endif
}

static inline Words words_of(Halves x) {
#if defined(__AVX512F__)
    return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(x)));
#elif defined(__AVX2__)
    return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x)));
#else
    return __builtin_convertvector(x, Words);
#endif
}

// ---- bf16: the upper half of an fp32 number.

static inline Floats widen_bf16(Halves x) {
#if defined(__AVX512BW__)
    // One permutation puts each number into the upper half of a word, and 0 into the lower half; to
    // extend and to shift would take two instructions.
    constexpr uint16_t _ = 0;
    alignas(64) static constexpr uint16_t kFrom[32] = {
        _, 0, _, 1, _, 2,  _, 3,  _, 4,  _, 5,  _, 6,  _, 7,
        _, 8, _, 9, _, 10, _, 11, _, 12, _, 13, _, 14, _, 15,
    };
    return reinterpret_cast<Floats>(_mm512_maskz_permutexvar_epi16(
        0xaaaaaaaa, *reinterpret_cast<const __m512i*>(kFrom),
        _mm512_castsi256_si512(reinterpret_cast<__m256i>(x))));
#else
    return as_floats(words_of(x) << 16);
#endif
}

// Rounds to the nearest, ties to even.
static inline Halves round_bf16(Floats x) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<Halves>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x)));
#else
    const Words u = as_words(x);
    const Words rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
    const Words kept = x == x ? rounded : (u >> 16 | 0x40);  // a NaN must not round to infinity
    return __builtin_convertvector(kept, Halves);
#endif
}

// ---- fp16

#if defined(__AVX512F__)
static inline Floats widen_fp16(Halves x) {
    return reinterpret_cast<Floats>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(x)));
}
static inline Halves round_fp16(Floats x) {
    return reinterpret_cast<Halves>(_mm512_cvtps_ph(
        reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
static inline Floats widen_fp16(Halves x) {
    return reinterpret_cast<Floats>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(x)));
}
static inline Halves round_fp16(Floats x) {
    return reinterpret_cast<Halves>(
        _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
}
#else
static inline Floats widen_fp16(Halves x) {
    const Words u = __builtin_convertvector(x, Words), sign = (u & 0x8000) << 16, rest = u & 0x7fff;
    const Words normal = (rest << 13) + (112 << 23);
    const Floats tiny = __builtin_convertvector(reinterpret_cast<Ints>(rest), Floats) * 0x1p-24f;
    Words found = rest < 0x400 ? as_words(tiny) : normal;
    found = rest >= 0x7c00 ? normal + (112 << 23) : found;  // infinity and NaN
    return as_floats(found | sign);
}
static inline Halves round_fp16(Floats x) {
    const Words u = as_words(x), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
    const Words normal = (rest + 0xfff + (rest >> 13 & 1) - (112 << 23)) >> 13;
    // 0.5 has the spacing of fp16's numbers below 2^-14: the addition rounds to them.
    const Words tiny = as_words(as_floats(rest) + 0.5f) - 0x3f000000;
    Words found = rest < 0x38800000 ? tiny : normal;
    found = rest >= 0x477ff000 ? Words{} + 0x7c00 : found;  // what rounds to 65,536 is infinity
    found = rest > 0x7f800000 ? Words{} + 0x7e00 : found;
    return __builtin_convertvector(found | sign, Halves);
}
#endif

// ---- Memory

static inline Floats load(const float* p) { return *reinterpret_cast<const FloatsThere*>(p); }
static inline Floats load(const bf16* p) {
    return widen_bf16(*reinterpret_cast<const HalvesThere*>(p));
}
static inline Floats load(const fp16* p) {
    return widen_fp16(*reinterpret_cast<const HalvesThere*>(p));
}

static inline void store(float* p, Floats x) { *reinterpret_cast<FloatsThere*>(p) = x; }
static inline void store(bf16* p, Floats x) {
    *reinterpret_cast<HalvesThere*>(p) = round_bf16(x);
}
static inline void store(fp16* p, Floats x) {
    *reinterpret_cast<HalvesThere*>(p) = round_fp16(x);
}

// The first n < kWidth numbers, the others 0. No address past them is touched.
template <class T>
static inline Floats load(const T* p, int n) {
    T there[kWidth] = {};
    for (int i = 0; i < n; ++i) there[i] = p[i];
    return load(there);
}
template <class T>
static inline void store(T* p, Floats x, int n) {
    T there[kWidth];
    store(there, x);
    for (int i = 0; i < n; ++i) p[i] = there[i];
}

// GCC would load x again for each instruction that takes it, and loads can be what limits a loop.
static inline void keep_in_register(Floats& x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#else
    (void)x;
#endif
}

// Calls body(i, n) for each vector of a row: n is kWidth, as a constant, or fewer for the last one.
// load_at and store_at then touch n numbers.
struct Whole {
    constexpr operator int() const { return kWidth; }
};
template <class Body>
static inline __attribute__((always_inline)) void for_vectors(int64_t first, int64_t last,
                                                              Body&& body) {
    int64_t i = first;
    for (; i + kWidth <= last; i += kWidth) body(i, Whole());
    if (i < last) body(i, static_cast<int>(last - i));
}
template <class T>
static inline Floats load_at(const T* p, Whole) {
    return load(p);
}
template <class T>
static inline Floats load_at(const T* p, int n) {
    return load(p, n);
}
template <class T>
static inline void store_at(T* p, Floats x, Whole) {
    store(p, x);
}
template <class T>
static inline void store_at(T* p, Floats x, int n) {
    store(p, x, n);
}

// x where the lane is below n, else `other`.
static inline Floats first_lanes(Floats x, Whole, Floats = Floats{}) { return x; }
static inline Floats first_lanes(Floats x, int n, Floats other = Floats{}) {
    Ints lane;
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    return lane < n ? x : other;
}

static inline float sum_of_lanes(Floats x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(reinterpret_cast<__m512>(x));
#else
    for (int half = kWidth / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) x[i] += x[i + half];
    return x[0];
#endif
}

// x minus the nearest integer; 0 where x is infinite.
static inline Floats from_nearest(Floats x) {
#if defined(__AVX512DQ__)
    return reinterpret_cast<Floats>(_mm512_reduce_ps(
        reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    const Floats rest = x - ((x + 0x1.8p23f) - 0x1.8p23f);  // right below 2^22
    const Floats size = as_floats(as_words(x) & 0x7fffffff);
    return size < 0x1p22f || x != x ? rest : Floats{};
#endif
}

// p 2^n for an integer n, 0 where that is below the smallest normal number.
static inline Floats times_power_of_2(Floats p, Floats n) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(
        _mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
    Floats clamped = n < -127.0f ? all(-127.0f) : n;
    clamped = clamped > 128.0f ? all(128.0f) : clamped;
    // The exponents 0 and 255 stand for 0 and infinity.
    const Words exponent = as_words(clamped + 0x1.8p23f) - (0x4b400000 - 127);
    return n == n ? p * as_floats(exponent << 23) : n;
#endif
}

// Rounds to what a tensor of T holds.
static inline Floats rounded(Floats x, const float*) { return x; }
static inline Floats rounded(Floats x, const bf16*) { return widen_bf16(round_bf16(x)); }
static inline Floats rounded(Floats x, const fp16*) { return widen_fp16(round_fp16(x)); }

// Stores a[0], b[0], a[1], b[1], ...
static inline void interleave(Longs a, Longs b, LongsThere* to) {
#if !__has_builtin(__builtin_shufflevector)  // GCC 11
    for (int i = 0; i < kLongs; ++i) {
        to[2 * i / kLongs][2 * i % kLongs] = a[i];
        to[2 * i / kLongs][2 * i % kLongs + 1] = b[i];
    }
#elif defined(__AVX512F__)
    to[0] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    to[1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#elif defined(__AVX2__)
    to[0] = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    to[1] = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#else
    to[0] = __builtin_shufflevector(a, b, 0, 2);
    to[1] = __builtin_shufflevector(a, b, 1, 3);
#endif
}

// The upper 32 bits of each lane, as its lower ones; what its upper ones hold is not said.
static inline Longs upper_halves(Longs x) {
#if defined(__AVX512F__)  // a shift would wait for the port that multiplies
    return reinterpret_cast<Longs>(
        _mm512_shuffle_epi32(reinterpret_cast<__m512i>(x), _MM_PERM_DDBB));
#else
    return x >> 32;
#endif
}

// The lower 32 bits of a, then those of b.
static inline Longs lower_halves(Longs a, Longs b) {
#if defined(__AVX512F__)
    return reinterpret_cast<Longs>(_mm512_mask_shuffle_epi32(
        reinterpret_cast<__m512i>(a), 0xaaaa, reinterpret_cast<__m512i>(b), _MM_PERM_CCAA));
#else
    return (a & 0xffffffff) | b << 32;
#endif
}

// The products of the lower 32 bits of each lane and a 32-bit number.
static inline Longs multiply_low(Longs x, uint32_t by) {
#if defined(__AVX512F__)
    return reinterpret_cast<Longs>(
        _mm512_mul_epu32(reinterpret_cast<__m512i>(x), _mm512_set1_epi64(by)));
#elif defined(__AVX2__)
    return reinterpret_cast<Longs>(
        _mm256_mul_epu32(reinterpret_cast<__m256i>(x), _mm256_set1_epi64x(by)));
#elif defined(__SSE2__)
    return reinterpret_cast<Longs>(
        _mm_mul_epu32(reinterpret_cast<__m128i>(x), _mm_set1_epi64x(by)));
#else
    return (x & 0xffffffff) * by;
#endif
}

// Lane l gets what lane l ^ kHalf holds; kHalf is a power of 2.
template <int kHalf>
static inline Floats swapped(Floats x) {
#if defined(__AVX512F__)
    const __m512 y = reinterpret_cast<__m512>(x);
    return reinterpret_cast<Floats>(kHalf == 8   ? _mm512_shuffle_f32x4(y, y, 0x4e)
                                    : kHalf == 4 ? _mm512_shuffle_f32x4(y, y, 0xb1)
                                    : kHalf == 2 ? _mm512_permute_ps(y, 0x4e)
                                                 : _mm512_permute_ps(y, 0xb1));
#elif defined(__AVX2__)
    const __m256 y = reinterpret_cast<__m256>(x);
    return reinterpret_cast<Floats>(kHalf == 4   ? _mm256_permute2f128_ps(y, y, 1)
                                    : kHalf == 2 ? _mm256_permute_ps(y, 0x4e)
                                                 : _mm256_permute_ps(y, 0xb1));
#elif defined(__SSE2__)
    const __m128 y = reinterpret_cast<__m128>(x);
    return reinterpret_cast<Floats>(kHalf == 2 ? _mm_shuffle_ps(y, y, 0x4e)
                                               : _mm_shuffle_ps(y, y, 0xb1));
#else
    Floats y;
    for (int i = 0; i < kWidth; ++i) y[i] = x[i ^ kHalf];
    return y;
#endif
}

// One step on the way from many vectors to one that holds the sum of the lanes of each: lane l gets
// the sum of the lanes l and l ^ kHalf, of b where l has the bit kHalf, else of a.
template <int kHalf>
static inline Floats paired(Floats a, Floats b) {
    Ints lane;
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    const Ints of_b = (lane & kHalf) != 0;
    return (of_b ? b : a) + swapped<kHalf>(of_b ? a : b);
}

}  // namespace gk::cpu::GK_ISA
