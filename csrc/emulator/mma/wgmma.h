// Twins of the warpgroup's products (device/wgmma.h, device/swizzled.h), for the emulator.
#pragma once

#include <cstdint>

#include "emulator/emulator.h"

namespace gk::emulator {

struct WgmmaForm {
    int n;
    bool bf16;         // else fp16
    bool a_mn, b_mn;   // MN-major, else K-major
};

// `acc`: n / 2 floats of the calling thread. A is in the 4 registers `a_registers` or, where that
// is nullptr, in shared memory where descriptor `a` says.
void wgmma(const WgmmaForm& form, float* acc, uint64_t a, const uint32_t* a_registers, uint64_t b,
           bool accumulate);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);

// The address by which descriptors name a place in the CTA's shared memory.
unsigned shared_address(const void* shared);

}  // namespace gk::emulator
