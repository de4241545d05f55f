// What an op's launcher is told of its dropout; device/philox.h makes the mask from it.
#pragma once

#include <cstdint>

namespace gk {

// The dropout of one op. The kernel reads what the pointer leads to, so that a CUDA graph can
// replay with a new seed in the same place.
struct Dropout {
    const int64_t* rng;  // (2,): seed, offset; nullptr where nothing is dropped
    uint32_t threshold;  // 0 ... 65536; 65536 drops everything
    float scale;         // of kept values: 65536 / (65536 - threshold), 0 where nothing is kept
};

}  // namespace gk
