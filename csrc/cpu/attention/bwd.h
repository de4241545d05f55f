// Attention backward, by the products of P. With keys down the rows and queries along the lanes, for
// a block of keys and a block of queries:
//     p = 2^(s - lse),  s from K Q^T      dp = V dO^T      ds = p (dp - delta)
//     dV += p dO        dK += ds Q        dQ^T += K^T ds
// where delta = sum_d dO O - dlse (Dao, "FlashAttention-2", 2023). The factor softmax_scale is
// applied at the end. An item is a key head and all queries of its query heads, so every sum has one
// order and no two threads add to the same number. dK and dV of the item's keys lie in fp32 in the
// scratch memory: 8 D Tk bytes, and less than 2 MB for the rest.
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

    const AttentionBwd& p;
    const AttentionCall& c;
    const Scores scores;
    const DropoutWords dropout;
    const int D, width, deep;
    Room room;
    float *dk_sum, *dv_sum;  // (keys, width)
    Number *k, *v, *k_transposed;
    Number *weights, *gradients;  // p and ds as A: (kKeys, kQueries)
    Number* gradients_right;      // ds of one group as B
    Number *queries, *douts;      // Q^T and dO^T as B, group by group
    Number *query_rows, *dout_rows;  // Q and dO as B
    float *dq;                    // dQ^T, group by group
    float *s, *dp, *slope, *mask;
    float *lse, *delta;           // (kQueries,); lse in units of log2(e)
    float *k_taint, *taint;
    uint32_t* words;
    Group groups[kGroups];
    int count;

    Backward(const AttentionBwd& given, void* scratch)
        : p(given), c(p.call), scores(c), dropout(c.dropout), D(static_cast<int>(c.D)),
          width(static_cast<int>(up_to(c.D, P::kWide))), deep(P::deep(D, width)), room(scratch) {
        const int64_t keys = up_to(c.Tk, kStrip);
        dk_sum = p.dk == nullptr ? nullptr : room.take<float>(keys * width);
        dv_sum = p.dv == nullptr ? nullptr : room.take<float>(keys * width);
        k = room.take<Number>(P::kKeys * width);
        v = room.take<Number>(P::kKeys * width);
        k_transposed = room.take<Number>(P::kKeys * width);
        weights = room.take<Number>(P::kKeys * P::kQueries);
        gradients = room.take<Number>(P::kKeys * P::kQueries);
        gradients_right = room.take<Number>(P::kKeys * kLanes);
        queries = room.take<Number>(P::kQueries * width);
        douts = room.take<Number>(P::kQueries * width);
        query_rows = room.take<Number>(P::kQueries * width);
        dout_rows = room.take<Number>(P::kQueries * width);
        dq = room.take<float>(P::kQueries * width);
        s = room.take<float>(P::kKeys * kLanes);
        dp = room.take<float>(P::kKeys * kLanes);
        slope = c.softcap > 0 ? room.take<float>(P::kKeys * kLanes) : nullptr;
        mask = c.mask.kind == MaskKind::none ? nullptr : room.take<float>(P::kKeys * kLanes);
        lse = room.take<float>(P::kQueries);
        delta = room.take<float>(P::kQueries);
        k_taint = room.take<float>(P::kKeys);
        taint = room.take<float>(kLanes);
        words = c.dropout.rng == nullptr ? nullptr : room.take<uint32_t>(P::kKeys / 2 * kLanes);
    }

    void run(const AttentionItem& item) {
        const Entry e(c, item.entry);
        [[maybe_unused]] const typename P::Session session;
        const int64_t sums = up_to(e.Tk, kStrip) * width;
        if (dk_sum != nullptr) clear(dk_sum, sums);
        if (dv_sum != nullptr) clear(dv_sum, sums);
        for (int64_t head = item.head; head < item.last_head; ++head)
            for (int64_t i = item.first; i < item.last; i += P::kQueries)
                block(e, item, head, i, least_of(i + P::kQueries, item.last));
        const int64_t key_head = item.head / (c.H / c.Hk);
        const int64_t token = ((e.batch * c.Tk + e.first_k) * c.Hk + key_head) * D;
        round(dk_sum, c.softmax_scale, e.Tk, static_cast<T*>(p.dk) + token);
        round(dv_sum, 1, e.Tk, static_cast<T*>(p.dv) + token);
    }

    static void clear(float* sum, int64_t n) {
        for (int64_t i = 0; i < n; ++i) sum[i] = 0;
    }

    // Where an entry's tokens of a head lie.
    template <class U>
    static U* tokens(U* tensor, const Strides& by, const Entry& e, int64_t first, int64_t head) {
        return tensor + e.batch * by.batch + first * by.token + head * by.head;
    }

    void block(const Entry& e, const AttentionItem& item, int64_t head, int64_t first,
               int64_t last) {
        count = 0;
        for (int64_t i = first; i < last; i += kLanes) prepare(e, head, i, last);
        const int64_t key_head = head / (c.H / c.Hk), high = e.highest(last - 1);
        const T* k_head =
            tokens(static_cast<const T*>(p.k), p.k_strides, e, e.first_k, key_head);
        const T* v_head =
            tokens(static_cast<const T*>(p.v), p.v_strides, e, e.first_k, key_head);
        for (int64_t j0 = e.lowest(first) / P::kKeys * P::kKeys; j0 <= high; j0 += P::kKeys) {
            const int keys = static_cast<int>(least_of(P::kKeys, high + 1 - j0));
            const T* k_block = k_head + j0 * p.k_strides.token;
            const auto k_left = P::rows(k_block, p.k_strides.token, keys, D, width, k);
            const auto v_left = P::rows(v_head + j0 * p.v_strides.token, p.v_strides.token, keys,
                                        D, width, v);
            typename P::Left k_across;
            const float* tainted = transposed<P>(k_block, p.k_strides.token, keys, D, width,
                                                 k_taint, k_transposed, k_across);
            for (int n = 0; n < count; ++n) {
                const Rows r(e, groups[n], j0, keys);
                if (!r.none())
                    meet(e, item, n, j0, r, tainted, k_left, v_left, k_across);
            }
            for (int strip = 0; strip < keys; strip += kStrip)
                add_strip(e, j0, keys, strip);
        }
        if (p.dq == nullptr) return;
        for (int n = 0; n < count; ++n) finish(e, groups[n], dq + n * kLanes * width);
    }

    // What is needed of a group's queries. One that holds NaN or Inf, or whose gradient does, gives
    // NaN to what it sees through its lse and delta, and counts as 0 in products: 0 * NaN would
    // reach keys that it does not see.
    void prepare(const Entry& e, int64_t head, int64_t i, int64_t last) {
        const int at = count * kLanes;
        Group& g = groups[count];
        g = {head, i, static_cast<int>(least_of(kLanes, last - i))};
        const int64_t token = e.first_q + i;
        const T* q = tokens(static_cast<const T*>(p.q), p.q_strides, e, token, head);
        const T* dout = tokens(static_cast<const T*>(p.dout), p.dout_strides, e, token, head);
        const T* out = static_cast<const T*>(p.out) + ((e.batch * c.Tq + token) * c.H + head) * D;
        const int64_t row = (e.batch * c.H + head) * c.Tq + token;
        const bool finite = all_finite(q, p.q_strides.token, g.count, D) &&
                            all_finite(dout, p.dout_strides.token, g.count, D);
        bool any = !finite;
        for (int lane = 0; lane < kLanes; ++lane) {
            lse[at + lane] = __builtin_inff();
            delta[at + lane] = taint[lane] = 0;
            if (lane >= g.count) continue;
            const T *q_row = q + lane * p.q_strides.token, *out_row = out + lane * c.H * D;
            const T* dout_row = dout + lane * p.dout_strides.token;
            if (!finite && !(all_finite(q_row, 0, 1, D) && all_finite(dout_row, 0, 1, D)))
                taint[lane] = __builtin_nanf("");
            const float known = p.lse[row + lane];
            if (known == -__builtin_inff()) continue;  // it sees no key
            Floats sum{};
            for_vectors(0, D, [&](int64_t d, auto m) {
                sum = multiply_add(load_at(dout_row + d, m), load_at(out_row + d, m), sum);
            });
            delta[at + lane] = sum_of_lanes(sum) - (p.dlse == nullptr ? 0 : p.dlse[row + lane]);
            taint[lane] += delta[at + lane] * 0.0f + known * 0.0f;
            lse[at + lane] = known * kLog2e + taint[lane];
            any = any || taint[lane] != 0;
        }
        const float* tainted = any ? taint : nullptr;
        P::columns(q, p.q_strides.token, g.count, D, width, queries + at * width);
        P::columns(dout, p.dout_strides.token, g.count, D, width, douts + at * width);
        P::right_rows(q, p.q_strides.token, g.count, D, width, tainted, query_rows + at * width);
        P::right_rows(dout, p.dout_strides.token, g.count, D, width, tainted,
                      dout_rows + at * width);
        clear(dq + at * width, kLanes * width);
        ++count;
    }

    void meet(const Entry& e, const AttentionItem& item, int n, int64_t j0, const Rows& r,
              const float* tainted, const typename P::Left& k_left,
              const typename P::Left& v_left, const typename P::Left& k_across) {
        const Group& g = groups[n];
        const int rows = P::padded(r.last) - r.first, at = n * kLanes * width;
        const int whole = static_cast<int>(up_to(r.last, kStrip));
        P::template multiply<false>(s + r.first * kLanes, kLanes, k_left.from(r.first, 0),
                                    {queries + at, kLanes}, rows, kLanes, deep);
        P::template multiply<false>(dp + r.first * kLanes, kLanes, v_left.from(r.first, 0),
                                    {douts + at, kLanes}, rows, kLanes, deep);
        if (mask != nullptr) load_mask(c.mask, g, item.entry, j0, r.first, r.last, mask);
        scores.adjust(e, g, j0, r, whole, s, tainted, mask, slope);
        if (words != nullptr)
            dropout.fill(item.entry * c.H + g.head, g.first, j0, r.first, r.last, words);
        const bool simple = scores.plain && tainted == nullptr && words == nullptr;
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
            P::template multiply<true>(dq + at, kLanes, k_across.from(0, r.first),
                                       typename P::Right{gradients_right, kLanes}.from(r.first),
                                       deep, kLanes, rows);
    }

    // Weights and gradients of scores, rows first ... last - 1. kHidden: some may be hidden, and
    // whatever a query holds, their weight is 0.
    template <bool kHidden>
    void weigh(int n, int first, int last) {
        const float factor = scores.rest();
        for (int vector = 0; vector < kVectors; ++vector) {
            const int lane = n * kLanes + vector * kWidth;
            const Floats base = load(lse + lane), difference = load(delta + lane);
            const auto pass = [&](auto change) {
                for (int row = first; row < last; row += 2) {
                    Floats w[2], ds[2];
#pragma GCC unroll 2
                    for (int k = 0; k < 2; ++k) {
                        const int at = (row + k) * kLanes + vector * kWidth;
                        const Floats score = load(s + at);
                        w[k] = exp2_of(multiply_add(score, factor, -base));
                        ds[k] = load(dp + at);
                        change(w[k], ds[k], difference, row + k, vector);
                        if (kHidden) {
                            w[k] = score == minus_infinity() ? Floats{} : w[k];
                            ds[k] = score == minus_infinity() ? Floats{} : ds[k];
                        }
                    }
                    P::put_left(weights, row, lane, w[0], w[1]);
                    P::put_left(gradients, row, lane, ds[0], ds[1]);
                    P::put_right(gradients_right, row, vector, ds[0], ds[1]);
                }
            };
            if (slope == nullptr && words == nullptr)
                pass([](Floats& w, Floats& ds, Floats difference, int, int) {
                    ds = w * (ds - difference);
                });
            else
                pass([&](Floats& w, Floats& ds, Floats difference, int row, int vector) {
                    Floats by = w;
                    if (words != nullptr) {
                        w = dropout.drop(w, words, row, vector);
                        ds = dropout.drop(ds, words, row, vector);
                    }
                    if (slope != nullptr)
                        by = by * load(slope + row * kLanes + vector * kWidth);
                    ds = by * (ds - difference);
                });
        }
    }

    // The groups that see a strip of keys add to its dK and dV.
    void add_strip(const Entry& e, int64_t j0, int keys, int strip) {
        int first = count, last = 0;
        for (int n = 0; n < count; ++n) {
            const Rows r(e, groups[n], j0, keys);
            if (r.none() || r.first > strip || r.last <= strip) continue;
            first = static_cast<int>(least_of(first, n));
            last = n + 1;
        }
        if (last <= first) return;
        const int rows = P::padded(static_cast<int>(least_of(kStrip, keys - strip)));
        const int from = first * kLanes, depth = (last - first) * kLanes;
        const int64_t key = (j0 + strip) * width;
        if (dv_sum != nullptr)
            P::template multiply<true>(
                dv_sum + key, width,
                P::left(weights).from(strip, from),
                typename P::Right{dout_rows, width}.from(from), rows, width, depth);
        if (dk_sum != nullptr)
            P::template multiply<true>(
                dk_sum + key, width,
                P::left(gradients).from(strip, from),
                typename P::Right{query_rows, width}.from(from), rows, width, depth);
    }

    void finish(const Entry& e, const Group& g, const float* sum) {
        const int64_t token = (e.batch * c.Tq + e.first_q + g.first) * c.H + g.head;
        T* to = static_cast<T*>(p.dq) + token * D;
        for (int vector = 0; vector < kVectors; ++vector)
            store_columns(sum + vector * kWidth, all(c.softmax_scale), g.count - vector * kWidth,
                          D, true, to + vector * kWidth * c.H * D, c.H * D);
    }

    // Rows of sums, times a factor, as a head's gradient.
    void round(const float* sum, float factor, int64_t rows, T* to) const {
        if (sum == nullptr) return;
        for (int64_t i = 0; i < rows; ++i)
            for_vectors(0, D, [&](int64_t d, auto m) {
                store_at(to + i * c.Hk * D + d, load_at(sum + i * width + d, m) * factor, m);
            });
    }
};

}  // namespace gk::cpu::GK_ISA
