// Attention backward, by the products of P. With keys down the rows and queries along the lanes,
// for a block of keys and a block of queries:
//     p = 2^(s - lse),  s from K Q^T      dp = V dO^T      ds = p (dp - delta)
//     dV += p dO        dK += ds Q        dQ^T += K^T ds
// where delta = sum_d dO O - dlse (Dao, "FlashAttention-2", 2023). The factor softmax_scale is
// applied at the end. An item is a key head and all queries of its query heads, so every sum has
// one order and no two threads add to the same number. Where that leaves threads idle, an item is a
// part of the queries and makes their dQ, or a part of the keys and makes their dK and dV; it sums
// in the same order.
//
// A thread's scratch memory, for each thread that works, however few the heads, has room for dK and
// dV of an entry's keys in fp32, 4 (D + Dv) Tk bytes, for keys and values as operands, 2 (2 D + Dv)
// Tk bytes for tiles and 4 (2 D + Dv) Tk for vectors, and less than 4 MB more. An item that is a
// part touches its part of the sums, and of the operands those of the keys that its queries see.
//
// by_query, sum_j ds |position - j|, is a sum of numbers that nearly cancel, for which the delta of
// a rounded O is not good enough. With the sums over a query's keys
//     S = sum p dp      R = sum p |position - j|      W = sum p dp |position - j|
// it is W - (S - dlse) R. What owns a group's dQ owns these too.
#pragma once

#include "cpu/attention/product.h"
#include "cpu/attention/room.h"

namespace gk::cpu::GK_ISA {

template <class P>
struct Backward {
    using T = typename P::Element;
    using Number = typename P::Number;
    static constexpr int kGroups = P::kQueries / kLanes;
    static constexpr int kStrip = 32;  // keys of dK and dV that a product makes at a time

    // A block of keys, and once it is ready its operands.
    struct Block {
        int64_t first;
        int keys;
        bool ready;
        typename P::Left k, v, across;  // across: K^T
        const float* tainted;           // NaN for keys that are not finite; null if all are
    };

    const AttentionBwd& p;
    const AttentionCall& c;
    const Scores scores;
    const DropoutWords dropout;
    const int D, width, deep, Dv, v_width, v_deep;
    Room room;
    float *dk_sum, *dv_sum;  // (keys, width), (keys, v_width)
    int64_t key_head, first_key, last_key;  // the keys that get gradients
    Block* blocks;
    int n_blocks;
    Number *k, *v, *across;
    Number *weights, *gradients;  // p and ds as A: (kKeys, kQueries)
    Number* gradients_right;      // ds of one group as B
    Number *queries, *douts;      // Q^T and dO^T as B, group by group
    Number *query_rows, *dout_rows;  // Q and dO as B
    float *dq;                    // dQ^T, group by group
    float *out_across, *dout_across;  // of a group, (v_width, kLanes)
    float *s, *dp, *slope, *mask;
    float* inverse;  // (kQueries,), of the sum of the weights that lse gives, about 1
    float *lse, *delta;           // (kQueries,); lse as Scores has a maximum
    float* sums;                  // (3, kQueries): S, R and W; or null
    float *key_taint, *taint;
    uint32_t* words;
    Group groups[kGroups];
    int count;

    Backward(const AttentionBwd& given, void* scratch)
        : p(given), c(p.call), scores(c), dropout(c.dropout), D(static_cast<int>(c.D)),
          width(static_cast<int>(up_to(c.D, P::kWide))), deep(P::deep(D, width)),
          Dv(static_cast<int>(c.Dv)), v_width(static_cast<int>(up_to(c.Dv, P::kWide))),
          v_deep(P::deep(Dv, v_width)), room(scratch) {
        const int64_t keys = up_to(p.most_keys, kStrip);
        dk_sum = p.dk == nullptr ? nullptr : room.take<float>(keys * width);
        dv_sum = p.dv == nullptr ? nullptr : room.take<float>(keys * v_width);
        const int64_t all = up_to(p.most_keys, P::kKeys);
        blocks = room.take<Block>(all / P::kKeys);
        k = room.take<Number>(all * width);
        v = room.take<Number>(all * v_width);
        across = room.take<Number>(all * width);
        key_taint = room.take<float>(all);
        weights = room.take<Number>(P::kKeys * P::kQueries);
        gradients = room.take<Number>(P::kKeys * P::kQueries);
        gradients_right = room.take<Number>(P::kKeys * kLanes);
        queries = room.take<Number>(P::kQueries * width);
        douts = room.take<Number>(P::kQueries * v_width);
        query_rows = room.take<Number>(P::kQueries * width);
        dout_rows = room.take<Number>(P::kQueries * v_width);
        dq = room.take<float>(P::kQueries * width);
        out_across = room.take<float>(v_width * kLanes);
        dout_across = room.take<float>(v_width * kLanes);
        s = room.take<float>(P::kKeys * kLanes);
        dp = room.take<float>(P::kKeys * kLanes);
        slope = c.softcap > 0 ? room.take<float>(P::kKeys * kLanes) : nullptr;
        mask = c.mask.kind == MaskKind::none ? nullptr : room.take<float>(P::kKeys * kLanes);
        lse = room.take<float>(P::kQueries);
        delta = room.take<float>(P::kQueries);
        inverse = room.take<float>(P::kQueries);
        sums = p.by_query == nullptr ? nullptr : room.take<float>(3 * P::kQueries);
        taint = room.take<float>(kLanes);
        words = c.dropout.rng == nullptr ? nullptr : room.take<uint32_t>(P::kKeys / 2 * kLanes);
    }

    void run(const BackwardItem& item) {
        static_assert(kPart % P::kQueries == 0 && kPart % P::kKeys == 0);
        const Entry e(c, item.entry);
        [[maybe_unused]] const typename P::Session session;
        const int64_t keys = item.last_key - item.first_key;
        if (dk_sum != nullptr) clear(dk_sum, up_to(keys, kStrip) * width);
        if (dv_sum != nullptr) clear(dv_sum, up_to(keys, kStrip) * v_width);
        int64_t first = item.first, last = item.last;
        if (p.dq == nullptr && p.by_query == nullptr) {  // the other queries see none of these keys
            first = most_of(first, e.lowest_query(item.first_key) / P::kQueries * P::kQueries);
            last = least_of(last, up_to(e.highest_query(item.last_key - 1) + 1, kLanes));
        }
        find_blocks(e, item.head / (c.H / c.Hk), first, last, item.first_key, item.last_key);
        for (int64_t head = item.head; head < item.last_head; ++head)
            for (int64_t i = first; i < last; i += P::kQueries)
                meet_all(e, item.entry, head, i, least_of(i + P::kQueries, last));
        const int64_t token = e.batch * c.Tk + e.first_k + item.first_key;
        const int64_t at = token * c.Hk + key_head;
        if (p.dk != nullptr)
            round(dk_sum, width, c.softmax_scale, keys, D, static_cast<T*>(p.dk) + at * D);
        if (p.dv != nullptr) round(dv_sum, v_width, 1, keys, Dv, static_cast<T*>(p.dv) + at * Dv);
    }

    static void clear(float* sum, int64_t n) {
        for (int64_t i = 0; i < n; ++i) sum[i] = 0;
    }

    // Where an entry's tokens of a head lie.
    template <class U>
    static U* tokens(U* tensor, const Strides& by, const Entry& e, int64_t first, int64_t head) {
        return tensor + e.batch * by.batch + first * by.token + head * by.head;
    }

    // The keys that some of the queries first ... last - 1 see. Where sum_again may need them,
    // those that get no gradient are among them.
    void find_blocks(const Entry& e, int64_t of_head, int64_t first, int64_t last, int64_t from,
                     int64_t to) {
        key_head = of_head;
        first_key = from;
        last_key = to;
        n_blocks = 0;
        if (first >= last) return;
        int64_t low = e.lowest(first), high = e.highest(last - 1);
        if (!kExact) {
            low = most_of(low, from);
            high = least_of(high, to - 1);
        }
        for (int64_t j = low / P::kKeys * P::kKeys; j <= high; j += P::kKeys)
            blocks[n_blocks++] = {j, static_cast<int>(least_of(P::kKeys, high + 1 - j)), false,
                                  {}, {}, {}, nullptr};
    }

    void make_ready(const Entry& e, Block& block) {
        const int64_t j = block.first, at = (&block - blocks) * P::kKeys;
        const int keys = block.keys;
        block.ready = true;
        const T* k_from =
            tokens(static_cast<const T*>(p.k), p.k_strides, e, e.first_k + j, key_head);
        const T* v_from =
            tokens(static_cast<const T*>(p.v), p.v_strides, e, e.first_k + j, key_head);
        block.k = P::rows(k_from, p.k_strides.token, keys, D, width, k + at * width);
        block.v = P::rows(v_from, p.v_strides.token, keys, Dv, v_width, v + at * v_width);
        block.tainted = transposed<P>(k_from, p.k_strides.token, keys, D, width, key_taint + at,
                                      across + at * width, block.across);
    }

    // Some queries of a head meet all keys.
    void meet_all(const Entry& e, int64_t b, int64_t head, int64_t first,
                  int64_t last) {
        count = 0;
        for (int64_t i = first; i < last; i += kLanes) prepare(e, head, i, last);
        for (int n = 0; n < count; ++n)
            if (kExact && (few_keys(e, groups[n]) || large_lse(n))) sum_again(e, b, n);
        for (int m = 0; m < n_blocks; ++m) {
            Block& block = blocks[m];
            if (block.first < first_key || block.first >= last_key) continue;
            bool any = false;
            for (int n = 0; n < count; ++n) any = meet(e, b, n, block) || any;
            if (any) add_keys(e, block.first, block.keys);
        }
        for (int n = 0; n < count; ++n) {
            if (p.dq != nullptr) finish(e, groups[n], dq + n * kLanes * width);
            if (p.by_query != nullptr) finish_sums(e, n);
        }
    }

    // What is needed of a group's queries. One that holds NaN or Inf, or whose gradient does, has
    // scores that are NaN where it sees a key, and counts as 0 in the sums for dK and dV: 0 * NaN
    // would reach keys that it does not see.
    void prepare(const Entry& e, int64_t head, int64_t i, int64_t last) {
        const int at = count * kLanes;
        Group& g = groups[count];
        g = {head, i, static_cast<int>(least_of(kLanes, last - i))};
        const int64_t token = e.first_q + i;
        const T* q = tokens(static_cast<const T*>(p.q), p.q_strides, e, token, head);
        const T* dout = tokens(static_cast<const T*>(p.dout), p.dout_strides, e, token, head);
        const T* out = static_cast<const T*>(p.out) + ((e.batch * c.Tq + token) * c.H + head) * Dv;
        const int64_t row = (e.batch * c.H + head) * c.Tq + token;
        const bool finite = all_finite(q, p.q_strides.token, g.count, D) &&
                            all_finite(dout, p.dout_strides.token, g.count, Dv);
        bool any = !finite;
        sum_delta(g, dout, out, delta + at);
        for (int lane = 0; lane < kLanes; ++lane) {
            lse[at + lane] = __builtin_inff();
            inverse[at + lane] = 1;
            taint[lane] = 0;
            if (lane >= g.count) continue;
            if (!finite && !(all_finite(q + lane * p.q_strides.token, 0, 1, D) &&
                             all_finite(dout + lane * p.dout_strides.token, 0, 1, Dv)))
                taint[lane] = __builtin_nanf("");
            const float known = p.lse[row + lane];
            if (known == -__builtin_inff()) {  // it sees no key
                delta[at + lane] = 0;
                continue;
            }
            if (p.dlse != nullptr) delta[at + lane] -= p.dlse[row + lane];
            taint[lane] += delta[at + lane] * 0.0f + known * 0.0f;
            lse[at + lane] = scores.of_natural(known) + taint[lane];
            any = any || taint[lane] != 0;
        }
        const float* tainted = any ? taint : nullptr;
        P::columns(q, p.q_strides.token, g.count, D, width, tainted, queries + at * width);
        P::columns(dout, p.dout_strides.token, g.count, Dv, v_width, tainted,
                   douts + at * v_width);
        P::right_rows(q, p.q_strides.token, g.count, D, width, tainted, query_rows + at * width);
        P::right_rows(dout, p.dout_strides.token, g.count, Dv, v_width, tainted,
                      dout_rows + at * v_width);
        clear(dq + at * width, kLanes * width);
        for (int sum = 0; p.by_query != nullptr && sum < 3; ++sum)
            clear(sums + sum * P::kQueries + at, kLanes);
        ++count;
    }

    // sum_d dO O
    void sum_delta(const Group& g, const T* dout, const T* out, float* to) {
        using Vectors = VectorProducts<T>;
        Vectors::columns(dout, p.dout_strides.token, g.count, Dv, v_width, nullptr, dout_across);
        Vectors::columns(out, c.H * Dv, g.count, Dv, v_width, nullptr, out_across);
        for (int lane = 0; lane < kLanes; lane += kWidth) {
            Floats sum{};
            for (int d = 0; d < Dv; ++d)
                sum = multiply_add(load(out_across + d * kLanes + lane),
                                   load(dout_across + d * kLanes + lane), sum);
            store(to + lane, sum);
        }
    }

    // In fp32 eager PyTorch does better than these formulas in two cases, in which a second pass
    // over the scores sums the weights and delta again. Where a query sees few keys, ds is a small
    // difference of large numbers, in which the rounding of O would remain. And the rounding of a
    // large lse, as ALiBi gives it, would remain in all of a query's weights.
    static constexpr bool kExact = __is_same(T, float);
    static bool few_keys(const Entry& e, const Group& g) {
        return e.highest(g.last()) - e.lowest(g.first) < 64;
    }
    bool large_lse(int n) const {
        for (int lane = 0; lane < groups[n].count; ++lane) {
            const float size = __builtin_fabsf(scores.natural(lse[n * kLanes + lane]));
            if (size > 16 && size < __builtin_inff()) return true;
        }
        return false;
    }
    // total = sum_j p, and the sink's weight     delta = sum_j p dp / total - dlse
    void sum_again(const Entry& e, int64_t b, int n) {
        const Group& g = groups[n];
        Floats sum[kVectors] = {}, total[kVectors] = {};
        for (int vector = 0; c.sinks != nullptr && vector < kVectors; ++vector)
            total[vector] = scores.change(all(scores.of_natural(c.sinks[g.head])),
                                          load(lse + n * kLanes + vector * kWidth));
        for (int m = 0; m < n_blocks; ++m) {
            const Rows r(e, g, blocks[m].first, blocks[m].keys);
            if (r.none()) continue;
            if (!score(e, b, n, blocks[m], r)) continue;
            for (int row = r.first; row < r.last; ++row)
                for (int vector = 0; vector < kVectors; ++vector) {
                    const Floats w = weight(n, row, vector);
                    sum[vector] += w == 0.0f ? Floats{} : w * upper(row, vector);
                    total[vector] += w;
                }
        }
        const int64_t at = (e.batch * c.H + g.head) * c.Tq + e.first_q + g.first;
        for (int lane = 0; lane < kLanes; ++lane) {
            const float all = total[lane / kWidth][lane % kWidth];
            const float found = all == 0 ? 0 : sum[lane / kWidth][lane % kWidth] / all;
            if (kExact && all > 0) inverse[n * kLanes + lane] = 1 / all;
            const bool given = p.dlse != nullptr && lane < g.count && all != 0;
            delta[n * kLanes + lane] = given ? found - p.dlse[at + lane] : found;
        }
    }
    // One vector of a row of weights, 0 where hidden, and of dp.
    Floats weight(int n, int row, int vector) const {
        const Floats score = load(s + row * kLanes + vector * kWidth);
        const int lane = n * kLanes + vector * kWidth;
        const Floats w = scores.weight(score, load(lse + lane)) * load(inverse + lane);
        return score == minus_infinity() ? Floats{} : w;
    }
    Floats upper(int row, int vector) const {
        const Floats found = load(dp + row * kLanes + vector * kWidth);
        return words == nullptr ? found : dropout.drop(found, words, row, vector);
    }

    // A group of queries meets a block of keys. Returns whether it sees any of them.
    bool meet(const Entry& e, int64_t b, int n, Block& block) {
        const Rows r(e, groups[n], block.first, block.keys);
        if (r.none()) return false;
        const int whole = static_cast<int>(up_to(r.last, kStrip));
        if (!score(e, b, n, block, r)) {  // others of these queries may see the block
            for (int row = r.first; row < whole; row += 2)
                for (int lane = n * kLanes; lane < (n + 1) * kLanes; lane += kWidth) {
                    P::put_left(weights, row, lane, Floats{}, Floats{});
                    P::put_left(gradients, row, lane, Floats{}, Floats{});
                }
            return false;
        }
        if (p.by_query != nullptr) add_sums(e, n, block.first, r);
        const bool simple = scores.plain && block.tainted == nullptr && words == nullptr;
        const int full_first = simple ? static_cast<int>(up_to(r.full_first, 2)) : whole;
        const int full_last = simple ? r.full_last / 2 * 2 : whole;
        if (full_first < full_last) {
            weigh<true>(n, r.first, full_first);
            weigh<false>(n, full_first, full_last);
            weigh<true>(n, full_last, whole);
        } else {
            weigh<true>(n, r.first, whole);
        }
        if (p.dq != nullptr)
            P::template multiply<true>(dq + n * kLanes * width, kLanes,
                                       block.across.from(0, r.first),
                                       typename P::Right{gradients_right, kLanes}.from(r.first),
                                       deep, kLanes, P::padded(r.last) - r.first);
        return true;
    }

    // s and dp of a group and the rows of a block. b: the number of the entry. Returns false where
    // the mask hides them all.
    bool score(const Entry& e, int64_t b, int n, Block& block, const Rows& r) {
        const Group& g = groups[n];
        Effect masked = Effect::nothing;
        if (mask != nullptr) masked = load_mask(c.mask, g, b, block.first, r.first, r.last, mask);
        if (masked == Effect::hides) return false;
        if (!block.ready) make_ready(e, block);
        const int rows = P::padded(r.last) - r.first;
        const int whole = static_cast<int>(up_to(r.last, kStrip));
        P::template multiply<false>(s + r.first * kLanes, kLanes, block.k.from(r.first, 0),
                                    {queries + n * kLanes * width, kLanes}, rows, kLanes, deep);
        P::template multiply<false>(dp + r.first * kLanes, kLanes, block.v.from(r.first, 0),
                                    {douts + n * kLanes * v_width, kLanes}, rows, kLanes, v_deep);
        scores.adjust(e, g, block.first, r, whole, s, block.tainted,
                      masked == Effect::some ? mask : nullptr, slope);
        if (words != nullptr)
            dropout.fill(b * c.H + g.head, g.first, block.first, r.first, r.last, words);
        return true;
    }

    // Weights and gradients of scores, rows first ... last - 1. kHidden: some may be hidden, and
    // whatever a query holds, their weight is 0.
    template <bool kHidden>
    void weigh(int n, int first, int last) {
        scores.with_weight([&](auto weight) {
            if (slope == nullptr && words == nullptr)
                weigh<kHidden>(n, first, last, weight,
                               [](Floats& w, Floats& ds, Floats minus, int, int) {
                                   ds = w * (ds - minus);
                               });
            else
                weigh<kHidden>(n, first, last, weight,
                               [&](Floats& w, Floats& ds, Floats minus, int row, int vector) {
                                   change(w, ds, minus, row, vector);
                               });
        });
    }
    void change(Floats& w, Floats& ds, Floats minus, int row, int vector) const {
        Floats by = w;
        if (words != nullptr) {
            w = dropout.drop(w, words, row, vector);
            ds = dropout.drop(ds, words, row, vector);
        }
        if (slope != nullptr) by = by * load(slope + row * kLanes + vector * kWidth);
        ds = by * (ds - minus);
    }
    // make(w, dp, delta, row, vector) makes of dp ds, and drops what is to be dropped.
    template <bool kHidden, class Weight, class Make>
    void weigh(int n, int first, int last, const Weight& weight, const Make& make) {
        const float *base = lse + n * kLanes, *minus = delta + n * kLanes;
        for (int row = first; row < last; row += 2)
            // All lanes of a row: they lie in the same lines of the cache.
            for (int vector = 0; vector < kVectors; ++vector) {
                const int lane = vector * kWidth;
                Floats w[2], ds[2];
#pragma GCC unroll 2
                for (int k = 0; k < 2; ++k) {
                    const int at = (row + k) * kLanes + lane;
                    const Floats score = load(s + at);
                    w[k] = weight(score, load(base + lane));
                    if (kExact) w[k] = w[k] * load(inverse + n * kLanes + lane);
                    ds[k] = load(dp + at);
                    make(w[k], ds[k], load(minus + lane), row + k, vector);
                    if (kHidden) {
                        w[k] = score == minus_infinity() ? Floats{} : w[k];
                        ds[k] = score == minus_infinity() ? Floats{} : ds[k];
                    }
                }
                P::put_left(weights, row, n * kLanes + lane, w[0], w[1]);
                P::put_left(gradients, row, n * kLanes + lane, ds[0], ds[1]);
                P::put_right(gradients_right, row, vector, ds[0], ds[1]);
            }
    }

    // The queries add to the dK and dV of a block of keys. Strips that the same groups see make one
    // product.
    void add_keys(const Entry& e, int64_t j0, int keys) {
        int start = 0, first = 0, last = 0;  // the strips so far, and their groups
        for (int strip = 0; strip < keys + kStrip; strip += kStrip) {
            int from = count, to = 0;
            for (int n = 0; n < count && strip < keys; ++n) {
                const Rows r(e, groups[n], j0, keys);
                if (r.none() || r.first > strip || r.last <= strip) continue;
                from = static_cast<int>(least_of(from, n));
                to = n + 1;
            }
            if (strip > start && (from != first || to != last)) {
                if (first < last)
                    add_strips(j0, start, static_cast<int>(least_of(strip, keys)) - start, first,
                               last);
                start = strip;
            }
            first = from;
            last = to;
        }
    }
    // In fp32 64 queries at a time: the shorter chains of additions lose fewer digits.
    void add_strips(int64_t j0, int start, int keys, int first, int last) {
        const int together = kExact ? 64 / kLanes : P::kQueries / kLanes;
        for (int n = first; n < last; n += together)
            add_groups(j0, start, keys, n, static_cast<int>(least_of(n + together, last)));
    }
    void add_groups(int64_t j0, int start, int keys, int first, int last) {
        const int rows = P::padded(keys), from = first * kLanes, depth = (last - first) * kLanes;
        const int64_t key = j0 + start - first_key;
        if (dv_sum != nullptr)
            P::template multiply<true>(dv_sum + key * v_width, v_width,
                                       P::left(weights).from(start, from),
                                       typename P::Right{dout_rows, v_width}.from(from), rows,
                                       v_width, depth);
        if (dk_sum != nullptr)
            P::template multiply<true>(dk_sum + key * width, width,
                                       P::left(gradients).from(start, from),
                                       typename P::Right{query_rows, width}.from(from), rows,
                                       width, depth);
    }

    void finish(const Entry& e, const Group& g, const float* sum) {
        const int64_t token = (e.batch * c.Tq + e.first_q + g.first) * c.H + g.head;
        T* to = static_cast<T*>(p.dq) + token * D;
        for (int vector = 0; vector < kVectors; ++vector)
            store_columns(sum + vector * kWidth, all(c.softmax_scale), g.count - vector * kWidth,
                          D, true, to + vector * kWidth * c.H * D, c.H * D);
    }

    // Rows of sums, `stride` apart, times a factor, as a head's gradient.
    void round(const float* sum, int64_t stride, float factor, int64_t rows, int columns,
               T* to) const {
        for (int64_t i = 0; i < rows; ++i)
            for_vectors(0, columns, [&](int64_t d, auto m) {
                store_at(to + i * c.Hk * columns + d, load_at(sum + i * stride + d, m) * factor,
                         m);
            });
    }

    // The keys of a block from j0 on add to a group's sums; a block's are summed apart first.
    void add_sums(const Entry& e, int n, int64_t j0, const Rows& r) {
        for (int vector = 0; vector < kVectors; ++vector) {
            Floats found[3] = {};
            for (int row = r.first; row < r.last; ++row) {
                const Floats w = weight(n, row, vector);
                const Floats far = w * Scores::distance(e, groups[n], j0 + row, vector);
                const Floats up = w == 0.0f ? Floats{} : upper(row, vector);
                found[0] = multiply_add(w, up, found[0]);
                found[1] += far;
                found[2] = multiply_add(far, up, found[2]);
            }
            for (int sum = 0; sum < 3; ++sum) {
                float* at = sums + sum * P::kQueries + n * kLanes + vector * kWidth;
                store(at, load(at) + found[sum]);
            }
        }
    }
    void finish_sums(const Entry& e, int n) {
        const Group& g = groups[n];
        const int64_t row = (e.batch * c.H + g.head) * c.Tq + e.first_q + g.first;
        for (int lane = 0; lane < g.count; ++lane) {
            const float* at = sums + n * kLanes + lane;
            const float S = at[0], R = at[P::kQueries], W = at[2 * P::kQueries];
            const float dlse = p.dlse == nullptr ? 0 : p.dlse[row + lane];
            // What a query without keys holds may be NaN.
            p.by_query[row + lane] = R == 0 ? 0 : W - (S - dlse) * R;
        }
    }
};

}  // namespace gk::cpu::GK_ISA
