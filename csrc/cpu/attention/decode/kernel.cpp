// Decoding: a split of an entry's keys for a block of rows, and the sum of a block's splits.
#include "cpu/attention/decode/cache.h"
#include "cpu/attention/decode/products.h"
#include "cpu/attention/decode/softmax.h"
#include "cpu/kernels.h"

#ifndef PF
#define PF 1
#endif
namespace gk::cpu::GK_ISA {
namespace {

// The keys first <= j < last.
struct Range {
    int64_t first, last;

    bool operator==(const Range&) const = default;
    Range within(int64_t from, int64_t to) const {
        return {first < from ? from : first, last < to ? last : to};
    }
};

// A number from 1 to kTogether as a constant.
template <int kCount>
struct Constant {
    constexpr operator int() const { return kCount; }
};
template <class Body>
static inline void with_constant(int64_t count, const Body& body) {
    switch (count) {
        case 1: return body(Constant<1>());
        case 2: return body(Constant<2>());
#if defined(__AVX512F__)
        case 3: return body(Constant<3>());
        case 4: return body(Constant<4>());
#endif
    }
}

// Where a row's query, result and sum are.
struct Place {
    int64_t i, h;

    Place(const AttentionDecode& p, const DecodeRows& rows, int64_t r) {
        const int64_t group = p.H / p.Hk, row = rows.first_row + r;
        i = row / group;
        h = rows.hk * group + row % group;
    }
};

// Writes the result of a row from its sums.
template <class T>
void finish(const AttentionDecode& p, const Columns& columns, const DecodeRows& rows, int64_t r,
            const float* sums, float max, float sum) {
    const Place place(p, rows, r);
    T* out = static_cast<T*>(p.out) + ((rows.b * p.Tq + place.i) * p.H + place.h) * p.D;
    const float scale = sum == 0 ? 0 : 1 / sum;
    for (int64_t col = 0; col < columns.whole; col += kWidth)
        store(out + col, load(sums + col) * scale);
    if (columns.rest()) columns.store_rest(out, load(sums + columns.whole) * scale);
    p.lse[(rows.b * p.H + place.h) * p.Tq + place.i] =
        sum == 0 ? -__builtin_inff() : max * kLn2 + __builtin_logf(sum);
}

template <class T>
void one(const AttentionDecode& p, const Columns& columns, const DecodeItem& item,
         float* scratch) {
    const int64_t width = decode_width(p.D), rows = item.rows.rows;
    float* q = scratch;
    float* out = item.partial == nullptr ? q + rows * width : item.partial;
    float* max = out + rows * width;
    float* sum = max + rows;
    float* s = scratch + rows * (2 * width + 2);
    for (int64_t r = 0; r < rows; ++r) {
        const Place place(p, item.rows, r);
        const T* from = static_cast<const T*>(p.q) + item.rows.b * p.q_strides.batch +
                        place.i * p.q_strides.token + place.h * p.q_strides.head;
        float* to = q + r * width;
        for (int64_t col = 0; col < columns.whole; col += kWidth)
            store(to + col, load(from + col));
        if (columns.rest()) store(to + columns.whole, columns.load_own(from));
        for (int64_t col = 0; col < width; ++col) out[r * width + col] = 0;
        max[r] = -__builtin_inff();
        sum[r] = 0;
    }
    const Cache<T> keys(p, p.k, p.k_strides, item.rows.b, item.rows.hk);
    const Cache<T> values(p, p.v, p.v_strides, item.rows.b, item.rows.hk);
    const T* buffers[2][kWidth];
    const T** tile = buffers[0];
    const T** next = buffers[1];
    const auto turn = [&] {
        const T** const other = tile;
        tile = next;
        next = other;
    };
    if (item.first < item.last)
    keys.rows(item.first / kWidth * kWidth, item.first, item.last, tile);
    for (int64_t j0 = item.first / kWidth * kWidth; j0 < item.last; j0 += kDecodeKeys) {
        const int64_t end = item.last - j0 < kDecodeKeys ? item.last : j0 + kDecodeKeys;
        for (int64_t j = j0; j < end; j += kWidth) {
            if (j + kWidth < end)
                keys.rows(j + kWidth, item.first, end, next);
            else
                values.rows(j0, item.first, end, next);
            for (int64_t r = 0; r < rows; r += kTogether)
                with_constant(rows - r < kTogether ? rows - r : kTogether, [&](auto count) {
                    score<count>(columns, q + r * width, tile, s + r * kDecodeKeys + (j - j0), PF && r == 0 ? next : nullptr);
                });
            turn();
        }
        Range seen[kDecodeRows];
        for (int64_t r = 0; r < rows; ++r) {
            const Place place(p, item.rows, r);
            const int64_t position = place.i + item.shift;
            const int64_t lowest = p.left < 0 ? 0 : position - p.left;
            seen[r] = Range{lowest, position + 1}.within(item.first, end);
            const int64_t count = (end - j0 + kWidth - 1) / kWidth * kWidth;
            const float factor =
                weigh(Score(p, place.h), s + r * kDecodeKeys, count, seen[r].first - j0,
                      seen[r].last - j0, position - j0, {max + r, sum + r});
            if (factor != 1)
                for (int64_t col = 0; col < width; col += kWidth)
                    store(out + r * width + col, load(out + r * width + col) * factor);
        }
        for (int64_t j = j0; j < end; j += kWidth) {
            if (j + kWidth < end)
                values.rows(j + kWidth, item.first, end, next);
            else if (end < item.last)
                keys.rows(j + kWidth, item.first, item.last, next);
            const bool more = j + kWidth < item.last;
            const auto add = [&](auto count, int64_t r, const Range& range) {
                if (range.first < range.last)
                    add_values<count>(columns, s + r * kDecodeKeys + (range.first - j0),
                                      tile + (range.first - j), range.last - range.first,
                                      out + r * width, PF && more && r == 0 ? next : nullptr);
            };
            for (int64_t r0 = 0; r0 < rows; r0 += kTogether) {
                const int64_t together = rows - r0 < kTogether ? rows - r0 : kTogether;
                // Rows that see different keys go one by one: a weight of 0 times a value that is
                // not finite is not a number.
                bool same = true;
                for (int64_t r = r0; r < r0 + together; ++r)
                    same = same && seen[r].within(j, j + kWidth) == seen[r0].within(j, j + kWidth);
                if (same)
                    with_constant(together, [&](auto count) {
                        add(count, r0, seen[r0].within(j, j + kWidth));
                    });
                else
                    for (int64_t r = r0; r < r0 + together; ++r)
                        add(Constant<1>(), r, seen[r].within(j, j + kWidth));
            }
            turn();
        }
    }
    if (item.partial == nullptr)
        for (int64_t r = 0; r < rows; ++r)
            finish<T>(p, columns, item.rows, r, out + r * width, max[r], sum[r]);
}

// The splits of each block are added in their order.
template <class T>
void combine(const AttentionDecode& p, const Columns& columns, const DecodeSplits& splits) {
    const int64_t width = decode_width(p.D), rows = splits.rows.rows;
    const int64_t size = decode_partial(rows, p.D);
    for (int64_t r = 0; r < rows; ++r) {
        const float* stats = splits.partials + rows * width + r;
        float max = -__builtin_inff(), sum = 0;
        for (int64_t i = 0; i < splits.count; ++i) {
            const float own = stats[i * size];
            max = own > max ? own : max;
        }
        float sums[256] = {};
        for (int64_t i = 0; i < splits.count; ++i) {
            const float factor = power(stats[i * size] - origin(max));
            const float* part = splits.partials + i * size + r * width;
            sum += stats[i * size + rows] * factor;
            for (int64_t col = 0; col < width; col += kWidth)
                store(sums + col, multiply_add(load(part + col), factor, load(sums + col)));
        }
        finish<T>(p, columns, splits.rows, r, sums, max, sum);
    }
}

template <class T>
void items_of(const AttentionDecode& p, const DecodeItem* items, int64_t count, float* scratch) {
    const Columns columns(p.D);
    for (int64_t i = 0; i < count; ++i) one<T>(p, columns, items[i], scratch);
}

template <class T>
void splits_of(const AttentionDecode& p, const DecodeSplits* splits, int64_t count) {
    const Columns columns(p.D);
    for (int64_t i = 0; i < count; ++i) combine<T>(p, columns, splits[i]);
}

}  // namespace

void attention_decode(const AttentionDecode& p, const DecodeItem* items, int64_t count,
                      float* scratch) {
    switch (p.dtype) {
        case DType::float32: return items_of<float>(p, items, count, scratch);
        case DType::bfloat16: return items_of<bf16>(p, items, count, scratch);
        case DType::float16: return items_of<fp16>(p, items, count, scratch);
    }
}

void attention_decode_combine(const AttentionDecode& p, const DecodeSplits* splits,
                              int64_t count) {
    switch (p.dtype) {
        case DType::float32: return splits_of<float>(p, splits, count);
        case DType::bfloat16: return splits_of<bf16>(p, splits, count);
        case DType::float16: return splits_of<fp16>(p, splits, count);
    }
}

}  // namespace gk::cpu::GK_ISA
