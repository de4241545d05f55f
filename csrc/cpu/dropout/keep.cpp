// The keep masks as tensors. The contract is in gptkernels/core/philox.py.
#include "cpu/kernels.h"
#include "cpu/philox.h"

namespace gk::cpu::GK_ISA {

void elementwise_keep(const ElementwiseKeep& p, int64_t first, int64_t last) {
    ElementMask mask(p.dropout);
    for (int64_t i = first; i < last; i += ElementMask::kBlock) {
        const int n = static_cast<int>(last - i < ElementMask::kBlock ? last - i
                                                                      : ElementMask::kBlock);
        mask.fill(i, n);
        for (int k = 0; k < n; ++k) p.keep[i + k] = mask.from[k] >= mask.threshold;
    }
}

void attention_keep(const AttentionKeep& p, int64_t first, int64_t last) {
    const Keys keys(static_cast<uint64_t>(p.dropout.rng[0]));
    const uint32_t offset = static_cast<uint32_t>(p.dropout.rng[1]);
    for (int64_t row = first; row < last; ++row) {
        const int64_t head = row / p.rows + p.first_head, i = row % p.rows + p.first_row;
        uint8_t* keep = p.keep + row * p.cols;
        const uint64_t c1 = static_cast<uint64_t>((i >> 4) * 8 + (i & 7));
        const Longs zero{};
        // A call has the columns j, j + 1, j + 8, j + 9 of this row, j = c0 / 4 * 16 + c0 % 4 * 2,
        // and those of the row 8 further on or back.
        for (int64_t c0 = 0; c0 < (p.cols + 15) / 16 * 4; c0 += kLongs) {
            const Lanes found = lanes_of(
                philox({numbered(c0), zero + c1, zero + static_cast<uint64_t>(head),
                        zero + offset}, keys));
            const Longs mine = i & 8 ? found.upper : found.lower;
            for (int call = 0; call < kLongs; ++call)
                for (int lane = 0; lane < 4; ++lane) {
                    const int64_t j = (c0 + call) / 4 * 16 + (c0 + call) % 4 * 2 + lane / 2 * 8 +
                                      lane % 2;
                    if (j < p.cols)
                        keep[j] = (mine[call] >> 16 * lane & 0xffff) >= p.dropout.threshold;
                }
        }
    }
}

}  // namespace gk::cpu::GK_ISA
