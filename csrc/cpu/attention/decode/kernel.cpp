// Decoding: a split of an entry's keys for a block of rows, and the sum of a block's splits.
#include "cpu/attention/decode/cache.h"
#include "cpu/attention/decode/products.h"
#include "cpu/attention/decode/softmax.h"
#include "cpu/attention/sink.h"
#include "cpu/kernels.h"

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

// A row's token, key head (from the block's first one) and query head.
struct Place {
    int64_t i, head, h;

    Place(const AttentionDecode& p, const DecodeRows& rows, int64_t r) {
        const int64_t group = p.H / p.Hk, row = rows.first_row + r % rows.rows;
        head = r / rows.rows;
        i = row / group;
        h = (rows.hk + head) * group + row % group;
    }
};

// Writes the result of a row from its sums.
template <class T>
void finish(const AttentionDecode& p, const Columns& columns, const DecodeRows& rows, int64_t r,
            const float* sums, float max, float sum) {
    const Place place(p, rows, r);
    T* out = static_cast<T*>(p.out) + ((rows.b * p.Tq + place.i) * p.H + place.h) * p.Dv;
    float scale = sum == 0 ? 0 : 1 / sum, most = max * kLn2;
    if (p.sinks != nullptr) {
        Floats natural = all(most), total = all(sum);
        scale = add_sink(all(p.sinks[place.h]), natural, total)[0];
        most = natural[0];
        sum = total[0];
    }
    for (int64_t col = 0; col < columns.whole; col += kWidth)
        store(out + col, load(sums + col) * scale);
    if (columns.rest()) columns.store_rest(out, load(sums + columns.whole) * scale);
    if (p.lse == nullptr) return;
    p.lse[(rows.b * p.H + place.h) * p.Tq + place.i] =
        sum == 0 ? -__builtin_inff() : most + __builtin_logf(sum);
}

// A split of a block of rows.
template <class T>
class Block {
  public:
    Block(const AttentionDecode& p, const Columns& of_keys, const Columns& of_values,
          const DecodeItem& item, float* scratch)
        : p_(p),
          of_keys_(of_keys),
          of_values_(of_values),
          item_(item),
          rows_(item.rows.rows),
          all_(item.rows.heads * rows_),
          q_width_(decode_width(p.D)),
          width_(decode_width(p.Dv)),
          keys_(p, p.k, p.k_strides, item.rows.b, item.rows.hk),
          values_(p, p.v, p.v_strides, item.rows.b, item.rows.hk),
          q_(scratch),
          out_(item.partial == nullptr ? scratch + all_ * q_width_ : item.partial),
          max_(out_ + all_ * width_),
          sum_(max_ + all_),
          scores_(scratch + all_ * (q_width_ + width_ + 2)) {}

    void run() {
        start();
        const int64_t first = item_.first / kWidth * kWidth;
        if (item_.first < item_.last) keys_.rows(first, item_.first, item_.last, tile_);
        for (int64_t j0 = first; j0 < item_.last; j0 += kDecodeKeys) {
            const int64_t end = item_.last - j0 < kDecodeKeys ? item_.last : j0 + kDecodeKeys;
            score_keys(j0, end);
            weigh_keys(j0, end);
            add_up_values(j0, end);
        }
        if (item_.partial == nullptr)
            for (int64_t r = 0; r < all_; ++r)
                finish<T>(p_, of_values_, item_.rows, r, out_ + r * width_, max_[r], sum_[r]);
    }

  private:
    void start() {
        for (int64_t r = 0; r < all_; ++r) {
            const Place place(p_, item_.rows, r);
            const T* from = static_cast<const T*>(p_.q) + item_.rows.b * p_.q_strides.batch +
                            place.i * p_.q_strides.token + place.h * p_.q_strides.head;
            float* to = q_ + r * q_width_;
            for (int64_t col = 0; col < of_keys_.whole; col += kWidth)
                store(to + col, load(from + col));
            if (of_keys_.rest()) store(to + of_keys_.whole, of_keys_.load_own(from));
            for (int64_t col = 0; col < width_; ++col) out_[r * width_ + col] = 0;
            max_[r] = -__builtin_inff();
            sum_[r] = 0;
        }
    }

    // Calls body(head, tile of the head, the tile to ask for) for each head.
    template <class Body>
    void each_head(const Strides& strides, bool more, const Body& body) {
        for (int64_t head = 0; head < item_.rows.heads; ++head) {
            Tile<T> next{tile_, (head + 1) * strides.head};
            if (head + 1 == item_.rows.heads) next = {more ? next_ : nullptr, 0};
            body(head, Tile<T>{tile_, head * strides.head}, next);
        }
        const T** const other = tile_;
        tile_ = next_;
        next_ = other;
    }

    void score_keys(int64_t j0, int64_t end) {
        for (int64_t j = j0; j < end; j += kWidth) {
            if (j + kWidth < end)
                keys_.rows(j + kWidth, item_.first, end, next_);
            else
                values_.rows(j0, item_.first, end, next_);
            each_head(p_.k_strides, true, [&](int64_t head, Tile<T> keys, Tile<T> next) {
                for (int64_t r = 0; r < rows_; r += kTogether) {
                    const int64_t row = head * rows_ + r;
                    with_constant(rows_ - r < kTogether ? rows_ - r : kTogether, [&](auto count) {
                        score<count>(of_keys_, q_ + row * q_width_, keys,
                                     scores_ + row * kDecodeKeys + (j - j0), next);
                    });
                    next.rows = nullptr;
                }
            });
        }
    }

    // What row r of each head sees of the keys first <= j < last.
    Range seen(int64_t r, int64_t first, int64_t last) const {
        const int64_t position = Place(p_, item_.rows, r).i + item_.shift;
        return Range{p_.left < 0 ? 0 : position - p_.left,
                     p_.right < 0 ? last : position + p_.right + 1}
            .within(first, last);
    }

    void weigh_keys(int64_t j0, int64_t end) {
        const int64_t count = (end - j0 + kWidth - 1) / kWidth * kWidth;
        for (int64_t r = 0; r < all_; ++r) {
            const Place place(p_, item_.rows, r);
            const Range range = seen(r, item_.first, end);
            const float factor = weigh(Score(p_, item_.rows.b, place.h), scores_ + r * kDecodeKeys,
                                       count, range.first - j0, range.last - j0,
                                       place.i + item_.shift - j0, {max_ + r, sum_ + r});
            float* out = out_ + r * width_;
            if (factor != 1)
                for (int64_t col = 0; col < width_; col += kWidth)
                    store(out + col, load(out + col) * factor);
        }
    }

    void add_up_values(int64_t j0, int64_t end) {
        Range ranges[kDecodeRows];
        for (int64_t j = j0; j < end; j += kWidth) {
            const bool last = end == item_.last && j + kWidth >= end;
            if (j + kWidth < end)
                values_.rows(j + kWidth, item_.first, end, next_);
            else if (!last)
                keys_.rows(j + kWidth, item_.first, item_.last, next_);
            for (int64_t r = 0; r < rows_; ++r)
                ranges[r] = seen(r, item_.first > j ? item_.first : j,
                                 end < j + kWidth ? end : j + kWidth);
            each_head(p_.v_strides, !last, [&](int64_t head, Tile<T> values, Tile<T> next) {
                const auto add = [&](auto count, int64_t r) {
                    const Range range = ranges[r];
                    const int64_t row = head * rows_ + r;
                    if (range.first < range.last)
                        add_values<count>(of_values_,
                                          scores_ + row * kDecodeKeys + (range.first - j0),
                                          Tile<T>{values.rows + (range.first - j), values.head},
                                          range.last - range.first, out_ + row * width_, next);
                    next.rows = nullptr;
                };
                for (int64_t r0 = 0; r0 < rows_; r0 += kTogether) {
                    const int64_t count = rows_ - r0 < kTogether ? rows_ - r0 : kTogether;
                    // Rows that see different keys go one by one: a weight of 0 times a value that
                    // is not finite is not a number.
                    bool same = true;
                    for (int64_t r = r0; r < r0 + count; ++r)
                        same = same && ranges[r] == ranges[r0];
                    if (same)
                        with_constant(count, [&](auto together) { add(together, r0); });
                    else
                        for (int64_t r = r0; r < r0 + count; ++r) add(Constant<1>(), r);
                }
            });
        }
    }

    const AttentionDecode& p_;
    const Columns &of_keys_, &of_values_;
    const DecodeItem& item_;
    const int64_t rows_, all_;  // rows of a head, and of all heads
    const int64_t q_width_, width_;  // of a row of q_, and of out_
    const Cache<T> keys_, values_;
    float *q_, *out_, *max_, *sum_, *scores_;
    const T* buffers_[2][kWidth];
    const T** tile_ = buffers_[0];  // of the first head
    const T** next_ = buffers_[1];
};

// The splits of each block are added in their order.
template <class T>
void combine(const AttentionDecode& p, const Columns& columns, const DecodeSplits& splits) {
    const int64_t width = decode_width(p.Dv), rows = splits.rows.heads * splits.rows.rows;
    const int64_t size = decode_partial(rows, p.Dv);
    for (int64_t r = 0; r < rows; ++r) {
        const float* stats = splits.partials + rows * width + r;
        float max = -__builtin_inff(), sum = 0;
        for (int64_t i = 0; i < splits.count; ++i) {
            const float own = stats[i * size];
            max = own > max ? own : max;
        }
        float sums[kDecodeWidth];
        for (int64_t col = 0; col < width; col += kWidth) store(sums + col, Floats{});
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
    const Columns of_keys(p.D), of_values(p.Dv);
    for (int64_t i = 0; i < count; ++i)
        Block<T>(p, of_keys, of_values, items[i], scratch).run();
}

template <class T>
void splits_of(const AttentionDecode& p, const DecodeSplits* splits, int64_t count) {
    const Columns columns(p.Dv);
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
