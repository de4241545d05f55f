// The dropout contract's device functions, for tests/emulator/test_emulator.py to compare with
// gptkernels/core/philox.py.
#include "cases.h"
#include "device/philox.h"

namespace {

// c int64 (5,) in: seed, offset, first query, first key, batch_head; n the threshold; b (16, 16)
// out: 1 where a score of the block is kept, rows the queries; `broken`: rows the keys.
GK_CASE(attention_keep) {
    auto c = static_cast<const int64_t*>(p.c);
    const gk::DropoutKey key = gk::dropout_key({c, uint32_t(p.n), 1.0f});
    const int query = int(c[2]), k = int(c[3]), batch_head = int(c[4]), lane = int(threadIdx.x);
    const uint32_t keep = p.broken ? gk::attention_keep_transposed(k, query, batch_head, key)
                                   : gk::attention_keep(query, k, batch_head, key);
    for (int tile = 0; tile < 2; ++tile) {
        for (int i = 0; i < 4; ++i) {
            int row = lane / 4 + 8 * (i / 2), col = 8 * tile + lane % 4 * 2 + i % 2;
            p.b[row * 16 + col] = gk::kept(keep, tile, i);
        }
    }
}

// c int64 (3,) in: seed, offset, first element; n the threshold; b (32, 8) out: eight elements of
// each thread
GK_CASE(elementwise_keep) {
    auto c = static_cast<const int64_t*>(p.c);
    const gk::DropoutKey key = gk::dropout_key({c, uint32_t(p.n), 1.0f});
    const uint32_t keep = gk::elementwise_keep8(c[2] + 8 * threadIdx.x, key);
    for (int i = 0; i < 8; ++i) p.b[8 * threadIdx.x + i] = float(keep >> i & 1);
}

}  // namespace
