// Attention forward, by the products of P: FlashAttention-2's online softmax (Dao, 2023), with keys
// down the rows and queries along the lanes.
//
// For each block of keys and each group of queries:
//     s = K Q^T, from q.k to scores       (keys, kLanes)
//     m, l: the running maximum and sum   (kLanes,)
//     o += V^T 2^(s - m)                  (Dv, kLanes), in fp32
// A query's numbers meet in an order that its own keys alone decide: blocks start at multiples of
// kKeys, and a block that the query does not see changes nothing.
#pragma once

#include "cpu/attention/product.h"
#include "cpu/attention/room.h"
#include "cpu/attention/sink.h"

namespace gk::cpu::GK_ISA {

// Blocks of keys that are made ready together, for the second-level cache: fewer of wide heads. A
// group meets one after the other, so its state stays in the first.
constexpr int kBlocks = 8, kWidths = 512;

template <class P>
struct Forward {
    using T = typename P::Element;
    using Number = typename P::Number;

    // A group's state.
    struct State {
        Number* queries;  // Q^T
        float* o;         // (v_width, kLanes)
        float* most;      // (kLanes,), as Scores has it
        float* sum;       // (kLanes,)
        bool started;
    };

    // A block of keys, and once a group sees one of them its operands.
    struct Block {
        int64_t first;
        int keys;
        bool ready;
        const T *k_from, *v_from;
        typename P::Left k, v;  // v: V^T
        const float* tainted;  // null where all values are finite
    };

    const AttentionFwd& p;
    const AttentionCall& c;
    const Scores scores;
    const DropoutWords dropout;
    const int D, width, deep, Dv, v_width, v_deep;
    const int together;  // blocks
    Room room;
    State states[kMostGroups];
    Group groups[kMostGroups];
    int count = 0;
    Block blocks[kBlocks];
    Number *k, *v, *apart;
    float *s, *mask, *taint;
    uint32_t* words;

    Forward(const AttentionFwd& given, void* scratch)
        : p(given), c(p.call), scores(c), dropout(c.dropout), D(static_cast<int>(c.D)),
          width(static_cast<int>(up_to(c.D, P::kWide))), deep(P::deep(D, width)),
          Dv(static_cast<int>(c.Dv)), v_width(static_cast<int>(up_to(c.Dv, P::kWide))),
          v_deep(P::deep(Dv, v_width)),
          together(least_of(kBlocks, kBlocks * kWidths / (width + v_width))), room(scratch) {
        k = room.take<Number>(together * P::kKeys * width);
        v = room.take<Number>(together * P::kKeys * v_width);
        taint = room.take<float>(together * P::kKeys);
        s = room.take<float>(P::kKeys * kLanes);
        apart = room.take<Number>(P::kKeys * kLanes);
        mask = c.mask.kind == MaskKind::none ? nullptr : room.take<float>(P::kKeys * kLanes);
        words = c.dropout.rng == nullptr ? nullptr : room.take<uint32_t>(P::kKeys / 2 * kLanes);
        for (State& state : states) {
            state.queries = room.take<Number>(width * kLanes);
            state.o = room.take<float>(v_width * kLanes);
            state.most = room.take<float>(kLanes);
            state.sum = room.take<float>(kLanes);
        }
    }

    void run(const AttentionItem& item) {
        const Entry e(c, item.entry);
        [[maybe_unused]] const typename P::Session session;
        for (int64_t head = item.head; head < item.last_head; ++head)
            for (int64_t i = item.first; i < item.last; i += kLanes) start(e, head, i, item.last);
        const int64_t key_head = item.head / (c.H / c.Hk);
        const T* k_head = static_cast<const T*>(p.k) + e.batch * p.k_strides.batch +
                          e.first_k * p.k_strides.token + key_head * p.k_strides.head;
        const T* v_head = static_cast<const T*>(p.v) + e.batch * p.v_strides.batch +
                          e.first_k * p.v_strides.token + key_head * p.v_strides.head;
        const int64_t high = e.highest(item.last - 1);
        for (int64_t j = e.lowest(item.first) / P::kKeys * P::kKeys; j <= high;
             j += together * P::kKeys) {
            int n_blocks = 0;
            for (int64_t j0 = j; j0 <= high && n_blocks < together; j0 += P::kKeys)
                blocks[n_blocks++] = {j0, static_cast<int>(least_of(P::kKeys, high + 1 - j0)),
                                      false, k_head + j0 * p.k_strides.token,
                                      v_head + j0 * p.v_strides.token, {}, {}, nullptr};
            for (int n = 0; n < count; ++n)
                for (int m = 0; m < n_blocks; ++m) meet(e, item, groups[n], states[n], blocks[m]);
        }
        for (int n = 0; n < count; ++n) finish(e, groups[n], states[n]);
    }

    void start(const Entry& e, int64_t head, int64_t i, int64_t last) {
        Group& g = groups[count];
        State& state = states[count++];
        g = {head, i, static_cast<int>(least_of(kLanes, last - i))};
        P::columns(static_cast<const T*>(p.q) + e.batch * p.q_strides.batch +
                       (e.first_q + i) * p.q_strides.token + head * p.q_strides.head,
                   p.q_strides.token, g.count, D, width, nullptr, state.queries);
        for (int vector = 0; vector < kVectors; ++vector) {
            store(state.most + vector * kWidth, minus_infinity());
            store(state.sum + vector * kWidth, Floats{});
        }
        state.started = false;
    }

    void make_ready(Block& block) {
        const int64_t at = (&block - blocks) * P::kKeys;
        block.ready = true;
        block.k = P::rows(block.k_from, p.k_strides.token, block.keys, D, width, k + at * width);
        block.tainted = transposed<P>(block.v_from, p.v_strides.token, block.keys, Dv, v_width,
                                      taint + at, v + at * v_width, block.v);
    }

    // A group meets a block of keys.
    void meet(const Entry& e, const AttentionItem& item, const Group& g, State& state,
              Block& block) {
        const Rows r(e, g, block.first, block.keys);
        if (r.none()) return;
        const int padded = P::padded(r.last), even = static_cast<int>(up_to(padded, 2));
        Effect masked = Effect::nothing;
        if (mask != nullptr)
            masked = load_mask(c.mask, g, item.entry, block.first, r.first, r.last, mask);
        if (masked == Effect::hides) return;
        if (!block.ready) make_ready(block);
        P::template multiply<false>(s + r.first * kLanes, kLanes, block.k.from(r.first, 0),
                                    {state.queries, kLanes}, padded - r.first, kLanes, deep);
        scores.adjust(e, g, block.first, r, even, s, nullptr,
                      masked == Effect::some ? mask : nullptr, nullptr);
        if (words != nullptr)
            dropout.fill(item.entry * c.H + g.head, g.first, block.first, r.first, r.last, words);
        // Weights take the place of their scores, unless those are needed again.
        Number* weights = block.tainted == nullptr ? reinterpret_cast<Number*>(s) : apart;
        weigh(state, weights, r.first, even);
        const typename P::Right right = typename P::Right{weights, kLanes}.from(r.first);
        const auto values = block.v.from(0, r.first);
        const int keys = padded - r.first;
        if (state.started)
            P::template multiply<true>(state.o, kLanes, values, right, v_deep, kLanes, keys);
        else
            P::template multiply<false>(state.o, kLanes, values, right, v_deep, kLanes, keys);
        state.started = true;
        if (block.tainted != nullptr) add_tainted(state, r, block);
    }

    // The weights of rows first ... last - 1, an even number. Brings the state to the new maximum.
    void weigh(State& state, Number* weights, int first, int last) {
        scores.with_weight([&](auto weight) {
            if (words == nullptr)
                weigh(state, weights, first, last, weight, [](Floats x, int, int) { return x; });
            else
                weigh(state, weights, first, last, weight, [&](Floats x, int row, int vector) {
                    return dropout.drop(x, words, row, vector);
                });
        });
    }
    template <class Weight, class Drop>
    void weigh(State& state, Number* weights, int first, int last, const Weight& weight,
               const Drop& drop) {
        for (int vector = 0; vector < kVectors; ++vector) {
            const int lane = vector * kWidth;
            const float* column = s + lane;
            Floats top[2] = {minus_infinity(), minus_infinity()};
            for (int row = first; row < last; row += 2)
                for (int n = 0; n < 2; ++n)
                    top[n] = larger(load(column + (row + n) * kLanes), top[n]);
            const Floats before = load(state.most + lane);
            const Floats most = larger(scores.most(larger(top[0], top[1])), before);
            const Floats base = zero_where_minus_infinity(most);
            store(state.most + lane, most);
            Floats sum[2] = {};
            for (int row = first; row < last; row += 2) {
                Floats w[2];
#pragma GCC unroll 2
                for (int n = 0; n < 2; ++n) {
                    w[n] = weight(load(column + (row + n) * kLanes), base);
                    sum[n] += w[n];
                    w[n] = drop(w[n], row + n, vector);
                }
                P::put_right(weights, row, vector, w[0], w[1]);
            }
            rescale(state, lane, scores.change(before, base), sum[0] + sum[1]);
        }
    }

    void rescale(State& state, int lane, Floats by, Floats sum) {
        store(state.sum + lane, multiply_add(load(state.sum + lane), by, sum));
        if (!state.started || all_ones(by)) return;
        for (int d = 0; d < v_width; ++d) {
            float* at = state.o + d * kLanes + lane;
            store(at, load(at) * by);
        }
    }

    // Values that are not finite: their rows were left out of the product, since 0 * NaN would
    // reach queries that do not see them.
    void add_tainted(State& state, const Rows& r, const Block& block) {
        for (int row = r.first; row < r.last; ++row) {
            if (block.tainted[row] == 0) continue;
            for (int vector = 0; vector < kVectors; ++vector) {
                const int lane = vector * kWidth;
                const Floats score = load(s + row * kLanes + lane);
                const Floats base = zero_where_minus_infinity(load(state.most + lane));
                Floats w = scores.weight(score, base);
                if (words != nullptr) w = dropout.drop(w, words, row, vector);
                for (int d = 0; d < Dv; ++d) {
                    const Floats value = load(block.v_from + row * p.v_strides.token + d, 1);
                    float* at = state.o + d * kLanes + lane;
                    store(at, score == minus_infinity() ? load(at)
                                                        : multiply_add(w, value[0], load(at)));
                }
            }
        }
    }

    void finish(const Entry& e, const Group& g, const State& state) {
        const int64_t token = (e.batch * c.Tq + e.first_q + g.first) * c.H + g.head;
        T* out = static_cast<T*>(p.out) + token * Dv;
        float* lse = p.lse + (e.batch * c.H + g.head) * c.Tq + e.first_q + g.first;
        for (int lane = 0; lane < kLanes; lane += kWidth) {
            Floats most = scores.natural(load(state.most + lane)), sum = load(state.sum + lane);
            Floats by = sum == 0.0f ? Floats{} : 1.0f / sum;
            if (c.sinks != nullptr) by = add_sink(all(c.sinks[g.head]), most, sum);
            store_columns(state.o + lane, by, g.count - lane, Dv, state.started,
                          out + lane * c.H * Dv, c.H * Dv);
            store(state.most + lane, most);
            store(state.sum + lane, sum);
        }
        for (int i = 0; i < g.count; ++i)
            lse[i] = state.sum[i] == 0 ? -__builtin_inff()
                                       : state.most[i] + __builtin_logf(state.sum[i]);
    }
};

}  // namespace gk::cpu::GK_ISA
