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
    BackwardItem item;  // forward all keys
    int64_t pairs;      // of queries and keys, about
};

int64_t tokens(const int32_t* cu_seqlens, int64_t b, int64_t all) {
    if (cu_seqlens == nullptr) return all;
    const auto end = [&](int64_t n) { return std::clamp<int64_t>(cu_seqlens[n], 0, all); };
    return std::max<int64_t>(end(b + 1) - end(b), 0);
}

// About how many pairs the tokens first ... last - 1 make, of n, each with those of m others from
// `before` its own position up to `after` it; negative: no bound.
int64_t pairs(int64_t first, int64_t last, int64_t n, int64_t m, int64_t before, int64_t after) {
    const int64_t middle = (first + last) / 2 + m - n;
    const int64_t low = before < 0 ? 0 : std::max<int64_t>(middle - before, 0);
    const int64_t high = after < 0 ? m : std::min(middle + after + 1, m);
    return (last - first) * std::max<int64_t>(high - low, 1);
}

void longest_first(std::vector<Job>& jobs) {
    std::stable_sort(jobs.begin(), jobs.end(),
                     [](const Job& a, const Job& b) { return a.pairs > b.pairs; });
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
                    found.push_back({{{b, from, to, first, last}, 0, Tk},
                                     (to - from) * pairs(first, last, Tq, Tk, c.left, c.right)});
                }
    }
    longest_first(found);
    return found;
}

// The same items, each cut into parts of so many keys.
std::vector<Job> key_jobs(const AttentionCall& c, const std::vector<Job>& whole, int64_t keys) {
    std::vector<Job> found;
    for (const Job& job : whole) {
        const int64_t Tq = job.item.last, Tk = job.item.last_key;
        for (int64_t first = 0; first < Tk; first += keys) {
            Job part = job;
            part.item.first_key = first;
            part.item.last_key = std::min(first + keys, Tk);
            part.pairs = (job.item.last_head - job.item.head) *
                         pairs(first, part.item.last_key, Tk, Tq, c.right, c.left);
            found.push_back(part);
        }
    }
    longest_first(found);
    return found;
}

int64_t pairs_of(const std::vector<Job>& all) {
    int64_t sum = 0;
    for (const Job& job : all) sum += job.pairs;
    return sum;
}

// The pairs of the thread that is ready last.
int64_t longest_of(const std::vector<Job>& all, int threads) {
    std::vector<int64_t> sums(threads);
    for (const Job& job : all) *std::min_element(sums.begin(), sums.end()) += job.pairs;
    return *std::max_element(sums.begin(), sums.end());
}

int worth_for(const AttentionCall& c, int threads, int64_t pairs) {
    return worth(threads, pairs * ((c.D + c.Dv) / 8 + 16));
}

// Calls run(i, scratch) for each of n items, with `bytes` of scratch memory for each thread. pairs:
// of queries and keys, in all items together.
template <class Run>
void run_all(const AttentionCall& c, size_t n, int64_t pairs, int threads, int64_t bytes,
             const Run& run) {
    if (n == 0) return;
    threads = static_cast<int>(std::min<int64_t>(worth_for(c, threads, pairs), n));
    bytes = (bytes + 4095) / 4096 * 4096;
    const auto deleter = [](char* p) { ::operator delete(p, std::align_val_t(4096)); };
    const std::unique_ptr<char, decltype(deleter)> scratch(
        static_cast<char*>(::operator new(bytes * threads, std::align_val_t(4096))), deleter);
    std::atomic<size_t> next{0};
    parallel_for(threads, threads, [&](int64_t first, int64_t) {
        for (size_t i = next++; i < n; i = next++) run(i, scratch.get() + first * bytes);
    });
}

// The products that a pair of a query and a key takes part in: s, dp, and those that are wanted.
int products(const AttentionBwd& p) {
    return 2 + (p.dq != nullptr) + (p.dk != nullptr) + (p.dv != nullptr);
}

// dq, by_query, dk and dv, of whole key heads; or, where threads would wait for the last of them,
// dq and by_query of parts of the queries, and dk and dv of parts of the keys, which make s and dp
// twice. The bits are the same.
void token_gradients(const AttentionBwd& p, int threads) {
    const AttentionCall& c = p.call;
    AttentionBwd for_queries = p, for_keys = p;
    for_queries.dk = for_queries.dv = nullptr;
    for_keys.dq = nullptr;
    for_keys.by_query = nullptr;
    const bool of_queries = p.dq != nullptr || p.by_query != nullptr;
    const bool of_keys = p.dk != nullptr || p.dv != nullptr;
    if (!of_queries && !of_keys) return;
    const std::vector<Job> whole = jobs(c, c.H / c.Hk, INT64_MAX / 2);
    const int64_t all = pairs_of(whole);
    const int used = worth_for(c, threads, all);
    const Kernels& use = kernels();
    const int64_t bytes = use.attention_bwd_scratch(p);
    const int64_t split = (of_queries ? products(for_queries) : 0) +
                          (of_keys ? products(for_keys) : 0);
    if (used == 1 || longest_of(whole, used) * products(p) <= all / used * split) {
        run_all(c, whole.size(), all, threads, bytes, [&](size_t i, void* scratch) {
            use.attention_bwd(p, whole[i].item, scratch);
        });
        return;
    }
    // About four parts for each thread.
    const auto part = [&](int64_t longest) {
        const double share = static_cast<double>(all) / whole[0].pairs / (4.0 * used);
        const int64_t least = static_cast<int64_t>(share * longest);
        return std::max<int64_t>((least + kPart - 1) / kPart, 1) * kPart;
    };
    std::vector<Job> queries, keys;
    if (of_queries) queries = jobs(c, c.H / c.Hk, part(whole[0].item.last));
    if (of_keys) keys = key_jobs(c, whole, part(whole[0].item.last_key));
    run_all(c, keys.size() + queries.size(), all, threads, bytes, [&](size_t i, void* scratch) {
        if (i < keys.size())
            use.attention_bwd(for_keys, keys[i].item, scratch);
        else
            use.attention_bwd(for_queries, queries[i - keys.size()].item, scratch);
    });
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
    AttentionBwd p = given;
    p.most_keys = 1;
    for (int64_t b = 0; b < p.call.batch; ++b)
        p.most_keys = std::max(p.most_keys, tokens(p.call.cu_seqlens_k, b, p.call.Tk));
    token_gradients(p, threads);
    if (p.dmask == nullptr) return;
    AttentionBwd alone = p;
    alone.dq = alone.dk = alone.dv = nullptr;
    alone.by_query = nullptr;
    const std::vector<MaskItem> items = mask_items(p);
    const int64_t all = pairs_of(jobs(p.call, p.call.H / p.call.Hk, INT64_MAX / 2));
    const Kernels& use = kernels();
    run_all(p.call, items.size(), all, threads, use.attention_bwd_scratch(alone),
            [&](size_t i, void* scratch) { use.attention_mask_bwd(alone, items[i], scratch); });
}

}  // namespace gk::cpu
