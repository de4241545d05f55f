#include "emulator/mma/wgmma_sum.h"

#include <cstring>

namespace gk::emulator {
namespace {

constexpr int kRows = 4;  // rows at a time, in registers with 16 columns
using Vector = float __attribute__((vector_size(64)));

}  // namespace

// The machine's widest instructions are found when the module is loaded.
#ifdef __x86_64__
__attribute__((target_clones("default", "avx2,fma", "avx512f")))
#endif
void add_product(float* sums, const float* a, const float* b, int n) {
    for (int row = 0; row < 64; row += kRows) {
        for (int column = 0; column < n; column += 16) {
            Vector acc[kRows];
            for (int r = 0; r < kRows; ++r) {
                std::memcpy(&acc[r], sums + (row + r) * n + column, sizeof(Vector));
            }
            for (int k = 0; k < 16; ++k) {
                Vector right;
                std::memcpy(&right, b + k * n + column, sizeof right);
                for (int r = 0; r < kRows; ++r) acc[r] += a[(row + r) * 16 + k] * right;
            }
            for (int r = 0; r < kRows; ++r) {
                std::memcpy(sums + (row + r) * n + column, &acc[r], sizeof(Vector));
            }
        }
    }
}

}  // namespace gk::emulator
