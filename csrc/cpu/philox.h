// The dropout contract's random numbers (gptkernels/core/philox.py): Philox4x32-10 of Salmon et
// al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
#pragma once

#include "cpu/dropout/params.h"
#include "cpu/vec.h"

namespace gk::cpu::GK_ISA {

// The key of each round, which all calls share.
struct Keys {
    uint64_t k0[10], k1[10];

    explicit Keys(uint64_t seed) {
        uint32_t lower = static_cast<uint32_t>(seed), upper = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            k0[round] = lower;
            k1[round] = upper;
            lower += 0x9E3779B9u;
            upper += 0xBB67AE85u;
        }
    }
};

// kLongs calls at a time. Only the lower 32 bits of a lane count; the upper ones hold anything.
struct Counters {
    Longs c0, c1, c2, c3;
};

static inline Counters philox(Counters c, const Keys& keys) {
    for (int round = 0; round < 10; ++round) {
        const Longs first = multiply_low(c.c0, 0xD2511F53u);
        const Longs second = multiply_low(c.c2, 0xCD9E8D57u);
        c.c0 = upper_halves(second) ^ c.c1 ^ keys.k0[round];
        c.c1 = second;
        c.c2 = upper_halves(first) ^ c.c3 ^ keys.k1[round];
        c.c3 = first;
    }
    return c;
}

// The lanes of each call, 8 of 16 bits, in its order: the first four in one number, then the
// others.
struct Lanes {
    Longs lower, upper;
};
static inline Lanes lanes_of(const Counters& c) {
    return {lower_halves(c.c0, c.c1), lower_halves(c.c2, c.c3)};
}

static inline Longs numbered(uint64_t first) {
    Longs lane;
    for (int i = 0; i < kLongs; ++i) lane[i] = i;
    return lane + first;
}

// The lanes of up to kBlock elements of a contiguous tensor.
struct ElementMask {
    static constexpr int kBlock = 512;

    Keys keys;
    uint32_t offset, threshold;
    float scale;
    const uint16_t* from;  // from[i] is the lane of element first + i
    // The first call may have 7 elements too many, the last calls of a vector more, and a vector of
    // lanes is read whole.
    uint16_t lanes[8 + kBlock + 8 * kLongs + kWidth];

    explicit ElementMask(const Dropout& p)
        : keys(p.rng == nullptr ? 0 : static_cast<uint64_t>(p.rng[0])),
          offset(p.rng == nullptr ? 0 : static_cast<uint32_t>(p.rng[1])),
          threshold(p.threshold),
          scale(p.scale) {}

    // Computes the lanes of the n <= kBlock elements from `first` on.
    void fill(int64_t first, int n) {
        const int64_t call = first / 8, last = (first + n + 7) / 8;
        const Longs zero{};
        for (int64_t i = call; i < last; i += kLongs) {
            const Longs number = numbered(i);
            const Lanes found = lanes_of(philox({number, number >> 32, zero, zero + offset}, keys));
            auto* to = reinterpret_cast<LongsThere*>(lanes + (i - call) * 8);
            interleave(found.lower, found.upper, to);
        }
        from = lanes + first % 8;
    }

    // x where elements first + i, ... are kept, times the scale, else 0.
    Floats drop(Floats x, int64_t i) const {
        const Halves there = *reinterpret_cast<const HalvesThere*>(from + i);
        return words_of(there) >= threshold ? x * scale : Floats{};
    }
};

}  // namespace gk::cpu::GK_ISA
