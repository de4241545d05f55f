// Twins of the warp's matrix instructions (device/mma.h, device/stmatrix.h), for the emulator.
#pragma once

#include <cstdint>

#include "emulator/emulator.h"

namespace gk::emulator {

// Collectives of a warp: all 32 lanes call, each with its own fragment.
void ldmatrix_x4(uint32_t (&r)[4], const void* row);
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row);
void stmatrix_x4(void* row, const uint32_t (&r)[4]);
void stmatrix_x4_trans(void* row, const uint32_t (&r)[4]);
void mma_m16n8k16_bf16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_m16n8k16_f16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

}  // namespace gk::emulator
