// attn_mask as rows of scores have it: keys down the rows, queries along the lanes. In memory keys
// lie together, so squares of 32-bit words are transposed, each of which holds up to 4 elements.
#pragma once

#include "cpu/attention/band.h"
#include "cpu/transpose.h"

namespace gk::cpu::GK_ISA {

constexpr int kVectors = kLanes / kWidth;  // of a row of scores

static inline Floats minus_infinity() { return all(-__builtin_inff()); }

// What a mask does to the scores of a block.
enum class Effect { nothing, some, hides };

// The elements of a mask in 32-bit words: a word of elements that hide, one of elements that change
// nothing, and element n of each word as what is added to a score.
template <class U>
struct InWords;
template <>
struct InWords<uint8_t> {  // bool: whether a query sees a key
    static constexpr uint32_t kHides = 0, kNothing = 0x01010101;
    static Floats part(Words x, int n) {
        return (x >> 8 * n & 0xff) != 0 ? Floats{} : minus_infinity();
    }
};
template <>
struct InWords<float> {
    static constexpr uint32_t kHides = 0xff800000, kNothing = 0;
    static Floats part(Words x, int) { return as_floats(x); }
};
template <>
struct InWords<bf16> {
    static constexpr uint32_t kHides = 0xff80ff80, kNothing = 0;
    static Floats part(Words x, int n) { return as_floats(n == 0 ? x << 16 : x & 0xffff0000); }
};
template <>
struct InWords<fp16> {
    static constexpr uint32_t kHides = 0xfc00fc00, kNothing = 0;
    static Floats part(Words x, int n) {
        return widen_fp16(__builtin_convertvector(x >> 16 * n, Halves));
    }
};

// The mask of a group's queries and some keys of a block.
template <class U>
struct MaskBlock {
    static constexpr int kEach = 4 / sizeof(U), kTogether = kEach * kWidth;
    const U* at;  // of the first query and key
    int64_t by_query, by_key;
    int queries, keys;

    static Words words(const U* p) { return *reinterpret_cast<const WordsThere*>(p); }

    // Looks at all elements, or at as many as show that it is `some`.
    Effect effect() const {
        if (by_key != 1 || keys < kTogether) return Effect::some;
        Words from_hides{}, from_nothing{};
        for (int i = 0; i < (by_query == 0 ? 1 : queries); ++i) {
            for (int j = 0; j < keys; j += kTogether) {
                const Words x = words(at + i * by_query + least_of(j, keys - kTogether));
                from_hides |= x ^ InWords<U>::kHides;
                from_nothing |= x ^ InWords<U>::kNothing;
            }
            if (any_bit(from_hides) && any_bit(from_nothing)) return Effect::some;
        }
        return any_bit(from_hides) ? Effect::nothing : Effect::hides;
    }

    // Into to[key][kLanes]. Lanes past the queries repeat the last one.
    void load(float* to) const {
        if (by_query == 0) {
            for (int j = 0; j < keys; ++j)
                for (int v = 0; v < kVectors; ++v)
                    store(to + j * kLanes + v * kWidth, all(one(0, j)));
        } else if (by_key == 1 && keys >= kTogether) {
            for (int v = 0; v < kVectors; ++v)
                for (int j = 0; j < keys; j += kTogether)
                    load_square(v, static_cast<int>(least_of(j, keys - kTogether)), to);
        } else {
            for (int j = 0; j < keys; ++j)
                for (int i = 0; i < kLanes; ++i) to[j * kLanes + i] = one(i, j);
        }
    }

  private:
    const U* of_lane(int i) const { return at + least_of(i, queries - 1) * by_query; }

    float one(int i, int j) const {
        uint32_t word = 0;
        __builtin_memcpy(&word, of_lane(i) + j * by_key, sizeof(U));
        return InWords<U>::part(Words{} + word, 0)[0];
    }

    void load_square(int v, int j, float* to) const {
        Floats square[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) square[i] = as_floats(words(of_lane(v * kWidth + i) + j));
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i)
            for (int n = 0; n < kEach; ++n)
                store(to + (j + i * kEach + n) * kLanes + v * kWidth,
                      InWords<U>::part(as_words(square[i]), n));
    }
};

// Returns what the mask does to the keys j0 + first ... j0 + last - 1 of a group, and where it does
// something to some of them, loads it into to[row][kLanes]. b: the number of the entry.
static inline Effect load_mask(const Mask& mask, const Group& g, int64_t b, int64_t j0, int first,
                               int last, float* to) {
    const MaskStrides& by = mask.by;
    const int64_t start =
        b * by.batch + g.head * by.head + g.first * by.query + (j0 + first) * by.key;
    const auto load = [&](const auto* elements) {
        const MaskBlock block{elements + start, by.query, by.key, g.count, last - first};
        const Effect effect = block.effect();
        if (effect == Effect::some) block.load(to + first * kLanes);
        return effect;
    };
    if (mask.kind == MaskKind::visible) return load(static_cast<const uint8_t*>(mask.at));
    switch (mask.dtype) {
        case DType::float32: return load(static_cast<const float*>(mask.at));
        case DType::bfloat16: return load(static_cast<const bf16*>(mask.at));
        case DType::float16: return load(static_cast<const fp16*>(mask.at));
    }
    return Effect::some;
}

}  // namespace gk::cpu::GK_ISA
