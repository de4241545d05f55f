// Scores to weights, one row at a time, with the running maximum and sum of the keys before. Scores
// are in units of log2(e), so that weights are powers of 2.
#pragma once

#include "cpu/attention/decode/params.h"
#include "cpu/exp.h"

namespace gk::cpu::GK_ISA {
namespace {

// What makes a score of a product.
struct Score {
    bool capped;
    float scale, cap, slope;

    Score(const AttentionDecode& p, int64_t b, int64_t head)
        : capped(p.softcap > 0),
          scale(capped ? p.softmax_scale / p.softcap : p.softmax_scale * kLog2e),
          cap(p.softcap * kLog2e),
          slope(p.alibi_slopes == nullptr ? 0
                                          : p.alibi_slopes[b * p.alibi_stride + head] * kLog2e) {}
    // distance: from the first lane's key to the query.
    Floats operator()(Floats product, Ints lane, int64_t distance) const {
        Floats s = product * scale;
        if (capped) s = tanh_of(s) * cap;
        if (slope != 0) {
            const Ints off = static_cast<int32_t>(distance) - lane;
            s = multiply_add(__builtin_convertvector(off < 0 ? -off : off, Floats), -slope, s);
        }
        return s;
    }
};

struct Running {
    float* max;
    float* sum;
};

static inline float max_of_lanes(Floats x) {
    float max = x[0];
    for (int i = 1; i < kWidth; ++i) max = x[i] > max ? x[i] : max;
    return max;
}

// What `max` is subtracted as: a row that has seen no key has none.
static inline float origin(float max) { return max == -__builtin_inff() ? 0 : max; }

static inline float power(float x) { return exp2_of(all(x))[0]; }

// s: the products of one row with `count` keys, a multiple of kWidth; they become weights, of which
// those of the keys first <= i < last are right. Returns the factor of the sums so far.
float weigh(const Score& score, float* s, int64_t count, int64_t first, int64_t last,
            int64_t distance, Running running) {
    Ints lane;
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    Floats highest = all(*running.max);
    for (int64_t i = 0; i < count; i += kWidth) {
        Floats x = score(load(s + i), lane, distance - i);
        const int32_t from = static_cast<int32_t>(first - i), to = static_cast<int32_t>(last - i);
        x = lane >= from && lane < to ? x : all(-__builtin_inff());
        store(s + i, x);
        highest = x > highest ? x : highest;  // without NaN, whose weight is NaN
    }
    const float max = max_of_lanes(highest), zero = origin(max);
    Floats sum = {};
    for (int64_t i = 0; i < count; i += kWidth) {
        const Floats weight = exp2_of(load(s + i) - zero);
        store(s + i, weight);
        sum += weight;
    }
    const float factor = power(*running.max - zero);
    *running.sum = *running.sum * factor + sum_of_lanes(sum);
    *running.max = max;
    return factor;
}

}  // namespace
}  // namespace gk::cpu::GK_ISA
