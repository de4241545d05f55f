// wgmma.mma_async.m64nNk16 for each N (PTX ISA, "Asynchronous Multiply-and-Accumulate
// Instruction: wgmma.mma_async"), as device/wgmma.h calls it. Inline PTX needs every register of
// the accumulators written out, in the text and among the operands.
#pragma once

#include <cstdint>

#include "runtime/launch.h"

#ifndef GK_EMULATE

// The accumulators as operands, 8 x N / 16 of them, and their numbers in the text.
#define GK_TILE(i) "+f"(acc[i][0]), "+f"(acc[i][1]), "+f"(acc[i][2]), "+f"(acc[i][3])
#define GK_TILES_16 GK_TILE(0), GK_TILE(1)
#define GK_TILES_32 GK_TILES_16, GK_TILE(2), GK_TILE(3)
#define GK_TILES_48 GK_TILES_32, GK_TILE(4), GK_TILE(5)
#define GK_TILES_64 GK_TILES_48, GK_TILE(6), GK_TILE(7)
#define GK_TILES_80 GK_TILES_64, GK_TILE(8), GK_TILE(9)
#define GK_TILES_96 GK_TILES_80, GK_TILE(10), GK_TILE(11)
#define GK_TILES_112 GK_TILES_96, GK_TILE(12), GK_TILE(13)
#define GK_TILES_128 GK_TILES_112, GK_TILE(14), GK_TILE(15)
#define GK_TILES_144 GK_TILES_128, GK_TILE(16), GK_TILE(17)
#define GK_TILES_160 GK_TILES_144, GK_TILE(18), GK_TILE(19)
#define GK_TILES_176 GK_TILES_160, GK_TILE(20), GK_TILE(21)
#define GK_TILES_192 GK_TILES_176, GK_TILE(22), GK_TILE(23)
#define GK_TILES_208 GK_TILES_192, GK_TILE(24), GK_TILE(25)
#define GK_TILES_224 GK_TILES_208, GK_TILE(26), GK_TILE(27)
#define GK_TILES_240 GK_TILES_224, GK_TILE(28), GK_TILE(29)
#define GK_TILES_256 GK_TILES_240, GK_TILE(30), GK_TILE(31)
#define GK_NUMBERS_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define GK_NUMBERS_32 GK_NUMBERS_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define GK_NUMBERS_48 GK_NUMBERS_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define GK_NUMBERS_64 GK_NUMBERS_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define GK_NUMBERS_80 GK_NUMBERS_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define GK_NUMBERS_96 GK_NUMBERS_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define GK_NUMBERS_112 GK_NUMBERS_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define GK_NUMBERS_128 GK_NUMBERS_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define GK_NUMBERS_144 GK_NUMBERS_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define GK_NUMBERS_160 GK_NUMBERS_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define GK_NUMBERS_176 GK_NUMBERS_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define GK_NUMBERS_192 GK_NUMBERS_176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define GK_NUMBERS_208 GK_NUMBERS_192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define GK_NUMBERS_224 GK_NUMBERS_208 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define GK_NUMBERS_240 GK_NUMBERS_224 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define GK_NUMBERS_256 GK_NUMBERS_240 ", %120, %121, %122, %123, %124, %125, %126, %127"

// What both forms share: the sum starts from the accumulators if operand `add` is not 0.
#define GK_WGMMA(N, TYPE, add, a, rest)                                                          \
    "{\n.reg .pred p;\nsetp.ne.b32 p, %" #add ", 0;\n"                                            \
    "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" GK_NUMBERS_##N "}, " a   \
    ", p, 1, 1, " rest ";\n}\n"

// Operands o0 ... o6 follow the accumulators: descriptors of A and B, `add`, and whether A and B
// are MN-major; or four registers of A, the descriptor of B, `add`, and whether B is MN-major.
#define GK_WGMMA_FROM_SHARED(N, TYPE, o0, o1, o2, o3, o4)                                        \
    asm volatile(GK_WGMMA(N, TYPE, o2, "%" #o0 ", %" #o1, "%" #o3 ", %" #o4)                     \
                 : GK_TILES_##N                                                                  \
                 : "l"(a), "l"(b), "r"(add), "n"(kTransposeA), "n"(kTransposeB))
#define GK_WGMMA_FROM_REGISTERS(N, TYPE, o0, o1, o2, o3, o4, o5, o6)                             \
    asm volatile(GK_WGMMA(N, TYPE, o5, "{%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4, "%" #o6) \
                 : GK_TILES_##N                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(kTransposeB))

#define GK_WGMMA_SHAPE(N, o0, o1, o2, o3, o4, o5, o6)                                            \
    template <>                                                                                  \
    struct WgmmaShape<N> {                                                                       \
        template <bool kBf16, int kTransposeA, int kTransposeB>                                  \
        __device__ __forceinline__ static void multiply(float (&acc)[N / 8][4], uint64_t a,      \
                                                        uint64_t b, int add) {                   \
            if constexpr (kBf16) {                                                               \
                GK_WGMMA_FROM_SHARED(N, "bf16", o0, o1, o2, o3, o4);                             \
            } else {                                                                             \
                GK_WGMMA_FROM_SHARED(N, "f16", o0, o1, o2, o3, o4);                              \
            }                                                                                    \
        }                                                                                        \
        template <bool kBf16, int kTransposeB>                                                   \
        __device__ __forceinline__ static void multiply(float (&acc)[N / 8][4],                  \
                                                        const uint32_t (&a)[4], uint64_t b,      \
                                                        int add) {                               \
            if constexpr (kBf16) {                                                               \
                GK_WGMMA_FROM_REGISTERS(N, "bf16", o0, o1, o2, o3, o4, o5, o6);                  \
            } else {                                                                             \
                GK_WGMMA_FROM_REGISTERS(N, "f16", o0, o1, o2, o3, o4, o5, o6);                   \
            }                                                                                    \
        }                                                                                        \
    };

namespace gk::detail {

template <int N>
struct WgmmaShape;

GK_WGMMA_SHAPE(16, 8, 9, 10, 11, 12, 13, 14)
GK_WGMMA_SHAPE(32, 16, 17, 18, 19, 20, 21, 22)
GK_WGMMA_SHAPE(48, 24, 25, 26, 27, 28, 29, 30)
GK_WGMMA_SHAPE(64, 32, 33, 34, 35, 36, 37, 38)
GK_WGMMA_SHAPE(80, 40, 41, 42, 43, 44, 45, 46)
GK_WGMMA_SHAPE(96, 48, 49, 50, 51, 52, 53, 54)
GK_WGMMA_SHAPE(112, 56, 57, 58, 59, 60, 61, 62)
GK_WGMMA_SHAPE(128, 64, 65, 66, 67, 68, 69, 70)
GK_WGMMA_SHAPE(144, 72, 73, 74, 75, 76, 77, 78)
GK_WGMMA_SHAPE(160, 80, 81, 82, 83, 84, 85, 86)
GK_WGMMA_SHAPE(176, 88, 89, 90, 91, 92, 93, 94)
GK_WGMMA_SHAPE(192, 96, 97, 98, 99, 100, 101, 102)
GK_WGMMA_SHAPE(208, 104, 105, 106, 107, 108, 109, 110)
GK_WGMMA_SHAPE(224, 112, 113, 114, 115, 116, 117, 118)
GK_WGMMA_SHAPE(240, 120, 121, 122, 123, 124, 125, 126)
GK_WGMMA_SHAPE(256, 128, 129, 130, 131, 132, 133, 134)

}  // namespace gk::detail

#undef GK_WGMMA_SHAPE
#undef GK_WGMMA_FROM_REGISTERS
#undef GK_WGMMA_FROM_SHARED
#undef GK_WGMMA

#endif
