// Decoding's launcher: makes the list of work, whose parts the threads take.
#include <algorithm>
#include <atomic>
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
        const int64_t highest = (first_row + rows - 1) / group + shift + p.right;
        seen_last = p.right < 0 ? length : std::min(highest + 1, length);
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
    // moved: numbers of keys and values; partial: numbers of partial results
    int64_t cost = 0, moved = 0, partial = 0;
};

// Calls body(b, first row, rows, cut) for every block of rows of every entry.
template <class Body>
void for_blocks(const AttentionDecode& p, const Body& body) {
    const int64_t all = p.H / p.Hk * p.Tq;
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t row = 0; row < all; row += kDecodeRows) {
            const int64_t rows = std::min(kDecodeRows, all - row);
            body(b, row, rows, Cut(p, b, row, rows));
        }
}

// How many key heads go together. All threads need work, and a few items each, so that all end at
// about the same time.
int64_t heads_together(const AttentionDecode& p, int threads, int64_t splits) {
    if (p.k_strides.head >= p.k_strides.token) return 1;
    const int64_t rows = std::min(kDecodeRows, p.H / p.Hk * p.Tq);
    const int64_t most = p.Hk * splits / (4 * threads);
    return std::clamp<int64_t>(std::min(most, kDecodeRows / rows), 1, p.Hk);
}

Work work_of(const AttentionDecode& p, int threads) {
    // Sizes first.
    int64_t count = 0, partial = 0;
    for_blocks(p, [&](int64_t, int64_t, int64_t rows, const Cut& cut) {
        const int64_t splits = cut.last - cut.first;
        count += splits;
        if (splits > 1) partial += p.Hk * splits * decode_partial(rows, p.Dv);
    });
    const int64_t together = heads_together(p, threads, count);
    Work work;
    work.items.reserve(count * ((p.Hk - 1) / together + 1));
    work.starts.reserve(work.items.capacity());
    if (partial > 0) work.partials = std::make_unique_for_overwrite<float[]>(partial);
    float* to = work.partials.get();
    for_blocks(p, [&](int64_t b, int64_t row, int64_t rows, const Cut& cut) {
        const int64_t splits = cut.last - cut.first;
        for (int64_t hk = 0; hk < p.Hk; hk += together) {
            const int64_t heads = std::min(together, p.Hk - hk);
            const DecodeRows place{b, hk, heads, row, rows};
            if (splits > 1) work.splits.push_back({place, to, splits});
            for (int64_t split = cut.first; split < cut.last; ++split) {
                const int64_t first = std::max(cut.seen_first, split * cut.keys);
                const int64_t last = std::min(cut.seen_last, (split + 1) * cut.keys);
                work.items.push_back({place, first, last, cut.shift, splits > 1 ? to : nullptr});
                work.starts.push_back(work.cost);
                const int64_t keys = heads * std::max<int64_t>(last - first, 0);
                work.cost += 64 * heads + keys * (rows + 4);
                work.moved += keys * (p.D + p.Dv);
                if (splits > 1) to += decode_partial(heads * rows, p.Dv);
            }
        }
    });
    work.partial = partial;
    return work;
}

}  // namespace

void attention_decode(const AttentionDecode& p, int threads) {
    const Kernels& run = kernels();
    const Work work = work_of(p, threads);
    const int useful = worth(threads, work.moved * static_cast<int64_t>(bytes_of(p.dtype)));
    // Before the threads start: one of them could not pass an exception on.
    const int64_t size = decode_scratch(kDecodeRows, p.D, p.Dv);
    const auto scratch = std::make_unique_for_overwrite<float[]>(size * useful);
    std::atomic<int64_t> next{0};
    parallel_for(work.cost, useful, [&](int64_t first, int64_t last) {
        const auto index = [&](int64_t cost) {
            return std::lower_bound(work.starts.begin(), work.starts.end(), cost) -
                   work.starts.begin();
        };
        const int64_t begin = index(first), count = index(last) - begin;
        if (count == 0) return;
        run.attention_decode(p, work.items.data() + begin, count,
                             scratch.get() + size * next++);
    });
    if (work.splits.empty()) return;
    parallel_for(static_cast<int64_t>(work.splits.size()), worth(threads, work.partial * 4),
                 [&](int64_t first, int64_t last) {
                     run.attention_decode_combine(p, work.splits.data() + first, last - first);
                 });
}

}  // namespace gk::cpu
