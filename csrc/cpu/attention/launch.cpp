// Attention's launchers: cut the work into items, the longest first, which threads take in turn.
#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "cpu/attention/params.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace gk::cpu {
namespace {

struct Job {
    AttentionItem item;
    int64_t pairs;  // of queries and keys, about
};

int64_t tokens(const int32_t* cu_seqlens, int64_t b, int64_t all) {
    if (cu_seqlens == nullptr) return all;
    const auto end = [&](int64_t n) { return std::clamp<int64_t>(cu_seqlens[n], 0, all); };
    return std::max<int64_t>(end(b + 1) - end(b), 0);
}

// About how many keys the queries first ... last - 1 see.
int64_t pairs(const AttentionCall& c, int64_t Tq, int64_t Tk, int64_t first, int64_t last) {
    const int64_t middle = (first + last) / 2 + Tk - Tq;
    const int64_t low = c.left < 0 ? 0 : std::max<int64_t>(middle - c.left, 0);
    const int64_t high = c.right < 0 ? Tk : std::min(middle + c.right + 1, Tk);
    return (last - first) * std::max<int64_t>(high - low, 1);
}

// `heads` query heads that share a key head, and `queries` of each, make an item.
std::vector<Job> jobs(const AttentionCall& c, int64_t heads, int64_t queries) {
    std::vector<Job> found;
    const int64_t group = c.H / c.Hk;
    for (int64_t b = 0; b < c.batch; ++b) {
        const int64_t Tq = tokens(c.cu_seqlens_q, b, c.Tq), Tk = tokens(c.cu_seqlens_k, b, c.Tk);
        for (int64_t key_head = 0; key_head < c.Hk; ++key_head)
            for (int64_t head = 0; head < group; head += heads)
                for (int64_t first = 0; first < Tq; first += queries) {
                    const int64_t last = std::min(first + queries, Tq);
                    const int64_t from = key_head * group + head;
                    const int64_t to = key_head * group + std::min(head + heads, group);
                    found.push_back({{b, from, to, first, last},
                                     (to - from) * pairs(c, Tq, Tk, first, last)});
                }
    }
    std::stable_sort(found.begin(), found.end(),
                     [](const Job& a, const Job& b) { return a.pairs > b.pairs; });
    return found;
}

// Calls run(i, scratch) for each of n items, with `bytes` of scratch memory for each thread. pairs:
// of queries and keys, in all items together.
template <class Run>
void run_all(const AttentionCall& c, size_t n, int64_t pairs, int threads, int64_t bytes,
             const Run& run) {
    if (n == 0) return;
    threads = static_cast<int>(
        std::min<int64_t>(worth(threads, pairs * (c.D / 4 + 16)), static_cast<int64_t>(n)));
    bytes = (bytes + 4095) / 4096 * 4096;
    const auto deleter = [](char* p) { ::operator delete(p, std::align_val_t(4096)); };
    const std::unique_ptr<char, decltype(deleter)> scratch(
        static_cast<char*>(::operator new(bytes * threads, std::align_val_t(4096))), deleter);
    std::atomic<size_t> next{0};
    parallel_for(threads, threads, [&](int64_t first, int64_t) {
        for (size_t i = next++; i < n; i = next++) run(i, scratch.get() + first * bytes);
    });
}

int64_t pairs_of(const std::vector<Job>& all) {
    int64_t sum = 0;
    for (const Job& job : all) sum += job.pairs;
    return sum;
}

// The parts of the mask, and for each the queries that it is added to.
std::vector<MaskItem> mask_items(const AttentionBwd& p) {
    const AttentionCall& c = p.call;
    constexpr int64_t kQueries = 256;
    const int64_t entries = p.dmask_strides.batch == 0 ? c.batch : 1;
    const int64_t heads = p.dmask_strides.head == 0 ? c.H : 1;
    const int64_t queries = p.dmask_strides.query == 0 ? c.Tq : kQueries;
    std::vector<MaskItem> found;
    for (int64_t b = 0; b < c.batch; b += entries)
        for (int64_t h = 0; h < c.H; h += heads)
            for (int64_t i = 0; i < c.Tq; i += queries)
                found.push_back({b, b + entries, h, h + heads, i, std::min(i + queries, c.Tq)});
    return found;
}

}  // namespace

void attention_fwd(const AttentionFwd& p, int threads) {
    const int64_t heads = std::min<int64_t>(p.call.H / p.call.Hk, kMostGroups);
    int64_t queries = kMostGroups / heads * kLanes;
    std::vector<Job> all = jobs(p.call, heads, queries);
    // Smaller items where threads would wait for the last ones; they give the same bits.
    while (queries > kLanes && static_cast<int64_t>(all.size()) < 4 * threads) {
        queries = std::max(queries / 2 / kLanes, int64_t{1}) * kLanes;
        all = jobs(p.call, heads, queries);
    }
    const Kernels& use = kernels();
    run_all(p.call, all.size(), pairs_of(all), threads, use.attention_fwd_scratch(p),
            [&](size_t i, void* scratch) { use.attention_fwd(p, all[i].item, scratch); });
}

void attention_bwd(const AttentionBwd& given, int threads) {
    const std::vector<Job> all = jobs(given.call, given.call.H / given.call.Hk, INT64_MAX / 2);
    const Kernels& use = kernels();
    AttentionBwd p = given;
    p.most_keys = 1;
    for (int64_t b = 0; b < p.call.batch; ++b)
        p.most_keys = std::max(p.most_keys, tokens(p.call.cu_seqlens_k, b, p.call.Tk));
    if (p.dq != nullptr || p.dk != nullptr || p.dv != nullptr)
        run_all(p.call, all.size(), pairs_of(all), threads, use.attention_bwd_scratch(p),
                [&](size_t i, void* scratch) { use.attention_bwd(p, all[i].item, scratch); });
    if (p.dmask == nullptr) return;
    AttentionBwd alone = p;
    alone.dq = alone.dk = alone.dv = nullptr;
    const std::vector<MaskItem> items = mask_items(p);
    run_all(p.call, items.size(), pairs_of(all), threads, use.attention_bwd_scratch(alone),
            [&](size_t i, void* scratch) { use.attention_mask_bwd(alone, items[i], scratch); });
}

}  // namespace gk::cpu
