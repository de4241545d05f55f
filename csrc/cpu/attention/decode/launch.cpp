// Decoding's launcher: makes the list of work, whose parts the threads take.
#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/attention/decode/params.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace gk::cpu {
namespace {

// The rule of gptkernels/ops/attention/splits.py.
constexpr int64_t kSplitKeys = 256, kMostSplits = 64, kSplitMultiple = 64;

int64_t keys_of_split(int64_t length, int64_t num_splits) {
    const int64_t last = std::max<int64_t>(length, 1) - 1;
    if (num_splits == 0) return kSplitKeys * (last / (kSplitKeys * kMostSplits) + 1);
    return kSplitMultiple * (last / num_splits / kSplitMultiple + 1);
}

// The keys that a block of rows sees, and the splits first <= s < last that hold them. A block that
// sees no key has one split, which is empty.
struct Cut {
    int64_t seen_first, seen_last, shift, keys, first = 0, last = 1;

    Cut(const AttentionDecode& p, int64_t b, int64_t first_row, int64_t rows) {
        const int64_t group = p.H / p.Hk;
        const int64_t length = std::clamp<int64_t>(p.key_lengths[b], 0, p.Tk);
        shift = length - p.Tq;
        const int64_t lowest = p.left < 0 ? 0 : first_row / group + shift - p.left;
        seen_first = std::max<int64_t>(lowest, 0);
        seen_last = (first_row + rows - 1) / group + shift + 1;
        keys = keys_of_split(length, p.num_splits);
        if (seen_last > seen_first) {
            first = seen_first / keys;
            last = (seen_last - 1) / keys + 1;
        }
    }
};

struct Work {
    std::vector<DecodeItem> items;
    std::vector<int64_t> starts;  // what the items before an item cost, about
    std::vector<DecodeSplits> splits;
    std::unique_ptr<float[]> partials;
    int64_t cost = 0, moved = 0;  // moved: numbers of keys and values
};

Work work_of(const AttentionDecode& p) {
    const int64_t all_rows = p.H / p.Hk * p.Tq;
    // What the partial results need.
    int64_t size = 0, count = 0;
    const auto blocks = [&](const auto& body) {
        for (int64_t b = 0; b < p.batch; ++b)
            for (int64_t row = 0; row < all_rows; row += kDecodeRows) {
                const int64_t rows = std::min(kDecodeRows, all_rows - row);
                body(b, row, rows, Cut(p, b, row, rows));
            }
    };
    blocks([&](int64_t, int64_t, int64_t rows, const Cut& cut) {
        const int64_t splits = cut.last - cut.first;
        count += p.Hk * splits;
        if (splits > 1) size += p.Hk * splits * decode_partial(rows, p.D);
    });
    Work work;
    work.items.reserve(count);
    work.starts.reserve(count);
    if (size > 0) work.partials = std::make_unique_for_overwrite<float[]>(size);
    float* partials = work.partials.get();
    blocks([&](int64_t b, int64_t row, int64_t rows, const Cut& cut) {
        const int64_t splits = cut.last - cut.first, one = decode_partial(rows, p.D);
        const auto item = [&](int64_t hk, int64_t split) {
            const DecodeRows place{b, hk, row, rows};
            const int64_t first = std::max(cut.seen_first, (cut.first + split) * cut.keys);
            const int64_t last = std::min(cut.seen_last, (cut.first + split + 1) * cut.keys);
            float* partial =
                splits == 1 ? nullptr : partials + (hk * splits + split) * one;
            work.items.push_back({place, first, last, cut.shift, partial});
            work.starts.push_back(work.cost);
            const int64_t keys = std::max<int64_t>(last - first, 0);
            work.cost += 64 + keys * (rows + 4);
            work.moved += 2 * keys * p.D;
            if (splits > 1 && split == 0) work.splits.push_back({place, partial, splits});
        };
        for (int64_t hk = 0; hk < p.Hk; ++hk)
            for (int64_t split = 0; split < splits; ++split) item(hk, split);
        if (splits > 1) partials += p.Hk * splits * one;
    });
    return work;
}

}  // namespace

void attention_decode(const AttentionDecode& p, int threads) {
    const Work work = work_of(p);
    const int64_t rows = std::min(kDecodeRows, p.H / p.Hk * p.Tq);
    const int useful = worth(threads, work.moved * static_cast<int64_t>(bytes_of(p.dtype)));
    parallel_for(work.cost, useful, [&](int64_t first, int64_t last) {
        const auto index = [&](int64_t cost) {
            return std::lower_bound(work.starts.begin(), work.starts.end(), cost) -
                   work.starts.begin();
        };
        const int64_t begin = index(first), count = index(last) - begin;
        if (count == 0) return;
        const auto scratch = std::make_unique_for_overwrite<float[]>(decode_scratch(rows, p.D));
        kernels().attention_decode(p, work.items.data() + begin, count, scratch.get());
    });
    const int64_t splits = static_cast<int64_t>(work.splits.size());
    if (splits == 0) return;
    const int64_t partial = static_cast<int64_t>(work.items.size()) * decode_partial(rows, p.D);
    parallel_for(splits, worth(threads, partial * 4), [&](int64_t first, int64_t last) {
        kernels().attention_decode_combine(p, work.splits.data() + first, last - first);
    });
}

}  // namespace gk::cpu
