// The arithmetic of wgmma, where the emulator spends most of its time on Hopper's kernels.
#pragma once

namespace gk::emulator {

// sums (64, n) += a (64, 16) b (16, n), n a multiple of 16. Products of 16-bit numbers are exact in
// fp32, so the sums are the same on every machine, whether it fuses additions or not.
void add_product(float* sums, const float* a, const float* b, int n);

}  // namespace gk::emulator
