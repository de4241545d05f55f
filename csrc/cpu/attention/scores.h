// From q.k to scores: scale, softcap, ALiBi, attn_mask; and from scores to weights. What a query
// does not see has the score -inf.
#pragma once

#include "cpu/attention/mask.h"
#include "cpu/exp.h"
#include "cpu/philox.h"

namespace gk::cpu::GK_ISA {

static inline Floats zero_where_minus_infinity(Floats x) {
    return x == minus_infinity() ? Floats{} : x;
}

// The lanes of a block of dropout's mask: words[kLanes] for each pair of keys j, j + 1, whose lanes
// are the two halves of a word. Pairs are numbered as the keys are, two by two.
struct DropoutWords {
    Keys keys;
    uint32_t offset, threshold;
    float scale;

    explicit DropoutWords(const Dropout& p)
        : keys(p.rng == nullptr ? 0 : static_cast<uint64_t>(p.rng[0])),
          offset(p.rng == nullptr ? 0 : static_cast<uint32_t>(p.rng[1])),
          threshold(p.threshold),
          scale(p.scale) {}

    // head: numbered through the batch. j0 is a multiple of 16, and so is `first`.
    void fill(int64_t head, int64_t i0, int64_t j0, int first, int last, uint32_t* words) const {
        const Longs zero{};
        for (int tile = 0; tile < kLanes / 16; ++tile)
            for (int r = first; r < last; r += 16)
                for (int call = 0; call < 4; ++call) {
                    const uint64_t c0 = static_cast<uint64_t>((j0 + r) / 16 * 4 + call);
                    uint64_t found[4][8];
                    for (int c = 0; c < 8; c += kLongs) {
                        const auto c1 = static_cast<uint64_t>((i0 / 16 + tile) * 8 + c);
                        const Counters made =
                            philox({zero + c0, numbered(c1), zero + static_cast<uint64_t>(head),
                                    zero + offset},
                                   keys);
                        *reinterpret_cast<LongsThere*>(found[0] + c) = made.c0;
                        *reinterpret_cast<LongsThere*>(found[1] + c) = made.c1;
                        *reinterpret_cast<LongsThere*>(found[2] + c) = made.c2;
                        *reinterpret_cast<LongsThere*>(found[3] + c) = made.c3;
                    }
                    // Words 0 and 1 are of the queries i & 8 = 0, 2 and 3 of the others; words 1
                    // and 3 are of the keys eight further on.
                    uint32_t* near = words + (r / 2 + call) * kLanes + tile * 16;
                    uint32_t* far = near + 4 * kLanes;
                    for (int i = 0; i < 8; ++i) {
                        near[i] = static_cast<uint32_t>(found[0][i]);
                        far[i] = static_cast<uint32_t>(found[1][i]);
                        near[i + 8] = static_cast<uint32_t>(found[2][i]);
                        far[i + 8] = static_cast<uint32_t>(found[3][i]);
                    }
                }
    }

    // x where key `row` of the block is kept, times the scale, else 0.
    Floats drop(Floats x, const uint32_t* words, int row, int vector) const {
        const Words there = *reinterpret_cast<const WordsThere*>(words + row / 2 * kLanes +
                                                                 vector * kWidth);
        const Words lane = row & 1 ? there >> 16 : there & 0xffff;
        return lane >= threshold ? x * scale : Floats{};
    }
};

// What turns q.k into a score.
//
// A plain score stays q.k, and its weight is 2^(factor q.k - m), with the maximum m in units of
// log2(e): one rounding less and one multiplication less. Other scores are natural, and their
// weight is 2^((s - m) log2(e)): where s and m are large and near, as with ALiBi, no digit is lost.
struct Scores {
    const AttentionCall& call;
    float factor;
    bool plain;

    explicit Scores(const AttentionCall& c)
        : call(c),
          factor(c.softmax_scale * kLog2e),
          // A negative factor would turn -inf, which hides a key, into inf.
          plain(c.softcap == 0 && c.alibi_slopes == nullptr && c.mask.kind == MaskKind::none &&
                c.softmax_scale > 0) {}

    // A maximum of what `adjust` leaves, in m's units, and natural again.
    Floats most(Floats s) const { return plain ? s * factor : s; }
    template <class X>
    X natural(X m) const {
        return plain ? m * kLn2 : m;
    }
    float of_natural(float m) const { return plain ? m * kLog2e : m; }

    // weight(s, m), as a function that knows whether scores are plain.
    template <class Body>
    void with_weight(Body&& body) const {
        if (plain)
            body([by = factor](Floats s, Floats m) { return exp2_of(multiply_add(s, by, -m)); });
        else
            body([](Floats s, Floats m) { return exp2_of((s - m) * kLog2e); });
    }
    Floats weight(Floats s, Floats m) const {
        return exp2_of(plain ? multiply_add(s, factor, -m) : (s - m) * kLog2e);
    }
    // By how much weights change where their maximum does, in m's units.
    Floats change(Floats from, Floats to) const {
        return exp2_of(plain ? from - to : (from - to) * kLog2e);
    }

    // s[row][kLanes], rows r.first ... `padded` - 1 of a block from key j0 on: q.k becomes a score.
    // Rows from r.last on are no keys. Plain scores are only hidden. taint: for each row 0, or NaN
    // for a key whose weights shall be NaN; or null. mask: as load_mask gives it. slope: gets the
    // softcap's derivative; or null.
    void adjust(const Entry& e, const Group& g, int64_t j0, const Rows& r, int padded, float* s,
                const float* taint, const float* mask, float* slope) const {
        if (plain && taint == nullptr) {
            hide(e, g, j0, r.first, r.full_first, s);
            hide(e, g, j0, r.full_last, r.last, s);
        } else {
            const float head_slope = e.slopes == nullptr ? 0 : e.slopes[g.head];
            for (int row = r.first; row < r.last; ++row)
                for (int v = 0; v < kVectors; ++v) {
                    const int at = row * kLanes + v * kWidth;
                    Floats x = load(s + at);
                    if (!plain) {
                        x = x * call.softmax_scale;
                        if (call.softcap > 0) {
                            const Floats t = tanh_of(x / call.softcap);
                            if (slope != nullptr) store(slope + at, 1.0f - t * t);
                            x = t * call.softcap;
                        }
                        if (e.slopes != nullptr)
                            x = multiply_add(distance(e, g, j0 + row, v), -head_slope, x);
                    }
                    const Floats given = mask == nullptr ? Floats{} : load(mask + at);
                    if (mask != nullptr) x = x + given;
                    if (taint != nullptr) x = x + taint[row];
                    if (mask != nullptr) x = given == minus_infinity() ? given : x;
                    store(s + at, x);
                }
            hide(e, g, j0, r.first, r.full_first, s);
            hide(e, g, j0, r.full_last, r.last, s);
        }
        for (int row = r.last; row < padded; ++row)
            for (int v = 0; v < kVectors; ++v)
                store(s + row * kLanes + v * kWidth, minus_infinity());
    }

    // Of a key from the queries of one vector, |position - j|.
    static Floats distance(const Entry& e, const Group& g, int64_t j, int vector) {
        const Ints away = lanes(g, vector) + static_cast<int32_t>(e.position(g.first) - j);
        return __builtin_convertvector(away < 0 ? -away : away, Floats);
    }

  private:
    // The number of each lane's query in the group.
    static Ints lanes(const Group& g, int vector) {
        Ints lane;
        for (int i = 0; i < kWidth; ++i) lane[i] = vector * kWidth + i;
        return lane < g.count ? lane : Ints{} + (g.count - 1);
    }

    static void hide(const Entry& e, const Group& g, int64_t j0, int first, int last, float* s) {
        if (last <= first) return;
        // As rows of the block, the keys that the group's first query sees.
        const auto row = [&](int64_t j) {
            return static_cast<int32_t>(within(j - j0, -(1 << 29), 1 << 29));
        };
        const int32_t lowest = row(e.position(g.first) - e.left);
        const int32_t highest = row(e.position(g.first) + e.right);
        for (int v = 0; v < kVectors; ++v) {
            const Ints lane = lanes(g, v), low = lane + lowest, high = lane + highest;
            for (int at = first; at < last; ++at) {
                float* there = s + at * kLanes + v * kWidth;
                const Ints key = Ints{} + at;
                store(there, ((key >= low) & (key <= high)) ? load(there) : minus_infinity());
            }
        }
    }
};

}  // namespace gk::cpu::GK_ISA
