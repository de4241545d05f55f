// Products of small matrices by one warp: D (16 x 8, fp32) += A (16 x K) B (K x 8).
//
// bf16 and fp16 run on the tensor cores, with K = 16. fp32 computes the same tile by FFMA, with
// K = 8, in full precision and never in tf32. So one kernel source serves every dtype.
//
// Layouts are those of the PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"
// and "ldmatrix". With g = lane / 4 and t = lane % 4, a lane holds of
//     accumulators  (row, column) (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
//     A, 16 bits    from (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8) on, two columns each
//     B, 16 bits    from (2t, g), (2t + 8, g) on, two rows each
//     A, fp32       rows g and g + 8, all 8 columns
//     B, fp32       columns 2t and 2t + 1, all 8 rows
#pragma once

#include <cstdint>
#include <cstring>

#include "device/vector.h"
#include "runtime/launch.h"

#ifdef GK_EMULATE
#include "emulator/mma/mma.h"
#endif

namespace gk {

// Loads four 8 x 8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix
// l / 8, which is 16 bytes of shared memory. It receives elements 2t and 2t + 1 of row g of each.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef GK_EMULATE
    emulator::ldmatrix_x4(r, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
                 : "memory");
#endif
}

// The same, transposed: a lane receives elements g of rows 2t and 2t + 1.
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
#ifdef GK_EMULATE
    emulator::ldmatrix_x4_trans(r, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
                 : "memory");
#endif
}

// acc += A B on the tensor cores; the last argument only names the type of the elements of A and B.
__device__ inline void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    __nv_bfloat16) {
#ifdef GK_EMULATE
    emulator::mma_m16n8k16_bf16(acc, a, b);
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ inline void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    __half) {
#ifdef GK_EMULATE
    emulator::mma_m16n8k16_f16(acc, a, b);
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Two floats, rounded to T, as one register: `low` in its lower half.
template <class T>
__device__ inline uint32_t round_pair(float low, float high) {
    Pack<T, 2> pair = from_floats<T>(low, high);
    uint32_t bits;
    static_assert(sizeof(pair) == sizeof(bits), "16-bit elements");
    memcpy(&bits, &pair, sizeof(bits));
    return bits;
}

template <class T>
struct Mma {
    static_assert(sizeof(T) == 2, "bf16, fp16, or the specialisation for fp32 below");
    static constexpr int K = 16;
    struct A {
        uint32_t r[4];
    };
    struct B {
        uint32_t r[2];
    };

    __device__ static void multiply(float (&acc)[4], const A& a, const B& b) {
        mma_m16n8k16(acc, a.r, b.r, T());
    }

    // Two neighbouring accumulator tiles (16 x 16), rounded to T, as A: their layouts coincide.
    __device__ static A from_accumulators(const float (*acc)[4]) {
        return {{round_pair<T>(acc[0][0], acc[0][1]), round_pair<T>(acc[0][2], acc[0][3]),
                 round_pair<T>(acc[1][0], acc[1][1]), round_pair<T>(acc[1][2], acc[1][3])}};
    }
};

template <>
struct Mma<float> {
    static constexpr int K = 8;
    struct A {
        float rows[2][8];
    };
    struct B {
        float cols[2][8];
    };

    // The eight products are summed first and then added to acc. Added one by one to a sum that has
    // grown large over a long k, they would lose nearly three times as much to rounding.
    __device__ static void multiply(float (&acc)[4], const A& a, const B& b) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float sum = a.rows[i / 2][0] * b.cols[i % 2][0];
#pragma unroll
            for (int k = 1; k < 8; ++k) sum = fmaf(a.rows[i / 2][k], b.cols[i % 2][k], sum);
            acc[i] += sum;
        }
    }

    // One accumulator tile (16 x 8) as A. A lane needs two whole rows; the four lanes of its quad
    // hold them.
    __device__ static A from_accumulators(const float (*acc)[4]) {
        A a;
        int quad = threadIdx.x & 28;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                a.rows[i][k] = __shfl_sync(0xffffffffu, acc[0][2 * i + k % 2], quad + k / 2);
            }
        }
        return a;
    }
};

}  // namespace gk
