// Stores rounded mma and wgmma accumulators as rows of 16 bytes (PTX ISA, "stmatrix"), on Hopper
// and later: the reverse of ldmatrix (device/mma.h).
#pragma once

#include <cstdint>

#include "runtime/launch.h"

#ifdef GK_EMULATE
#include "emulator/mma/mma.h"
#endif

namespace gk {

// Stores four 8 x 8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix
// l / 8, which is 16 bytes of shared memory, and elements 2t and 2t + 1 of row g of each matrix
// (g = l / 4, t = l % 4).
__device__ inline void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
#ifdef GK_EMULATE
    emulator::stmatrix_x4(row, r);
#else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(row))),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
#endif
}

// The same, transposed: a lane gives elements g of rows 2t and 2t + 1.
__device__ inline void stmatrix_x4_trans(void* row, const uint32_t (&r)[4]) {
#ifdef GK_EMULATE
    emulator::stmatrix_x4_trans(row, r);
#else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(row))),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
#endif
}

}  // namespace gk
