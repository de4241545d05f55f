// The keep masks of the dropout contract (gptkernels/core/philox.py), as tensors of bool.
#pragma once

#include <stdint.h>

namespace gk::cpu {

struct Dropout {
    const int64_t* rng;  // (2,): seed, offset; null: nothing is dropped
    uint32_t threshold;  // 0 ... 65536; 65536 drops everything
    float scale;         // of kept values: 65536 / (65536 - threshold), 0 where nothing is kept
};

struct ElementwiseKeep {
    Dropout dropout;
    uint8_t* keep;  // (count,), 1 where kept
    int64_t count;
};

struct AttentionKeep {
    Dropout dropout;
    uint8_t* keep;  // (heads, rows, cols)
    // The queries from first_row on, of the heads from first_head on, numbered through all entries
    // of the batch.
    int64_t heads, rows, cols, first_row, first_head;
};

// count, heads, rows and cols are at least 1. `threads`: the most that run.
void elementwise_keep(const ElementwiseKeep& p, int threads);
void attention_keep(const AttentionKeep& p, int threads);

}  // namespace gk::cpu
