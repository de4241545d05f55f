#include "emulator/fiber/clock.h"

#include <algorithm>

#include "emulator/fiber/grid.h"

namespace gk::emulator {
namespace {

constexpr int kLatest = (1 << kTimeBits) - 1;

void set_time(Thread& thread, int time) {
    thread.clock.now = epoch_of(*thread.cta->cluster, thread.member(), time);
}

void step(Thread& thread) {
    const int time = time_of(thread.clock.now) + 1;
    set_time(thread, time);
    int& top = thread.cta->cluster->clock.top;
    top = std::max(top, time);
}

// Joins whole warps: g++ vectorises only a constant length.
void join_warp(int* mine, const int* other) {
    for (unsigned i = 0; i < kWarp; ++i) mine[i] = mine[i] < other[i] ? other[i] : mine[i];
}

void join(int* mine, const int* other, unsigned first, unsigned last) {
    for (unsigned i = first; i < last; i += kWarp) join_warp(mine + i, other + i);
}

void widen(Past& past, unsigned first, unsigned last) {
    if (past.seen.size() < last) past.seen.resize(last);
    const auto clear = [&](unsigned from, unsigned to) {
        std::fill(past.seen.begin() + from, past.seen.begin() + to, 0);
    };
    if (past.last == 0) {
        clear(first, last);
        past.first = first;
        past.last = last;
    }
    if (first < past.first) {
        clear(first, past.first);
        past.first = first;
    }
    if (last > past.last) {
        clear(past.last, last);
        past.last = last;
    }
}

// All threads learn what any of them knows of the members first ... last - 1.
void share(const std::vector<Thread*>& threads, unsigned first, unsigned last) {
    static std::vector<int> known;
    known.assign(last, 0);
    for (const Thread* thread : threads) {
        if (thread->clock.far) join(known.data(), thread->clock.seen.data(), first, last);
    }
    for (Thread* thread : threads) {
        join(thread->clock.seen.data(), known.data(), first, last);
        thread->clock.far = true;
    }
}

std::vector<Thread*> threads_of(const Cta& cta) {
    std::vector<Thread*> threads;
    for (unsigned i = 0; i < cta.threads; ++i) threads.push_back(cta.fibers[i].get());
    return threads;
}

}  // namespace

Epoch epoch_of(const Cluster& cluster, unsigned member, int time) {
    if (time == kLatest) fail("this CTA synchronised 4 million times, too often to follow");
    return epoch_at(cluster.clock.serial, member, time);
}

void start_clocks(Cluster& cluster, unsigned serial) {
    ClusterClock& clock = cluster.clock;
    int top = 0;
    for (const Cta* cta : cluster.ctas) top = std::max(top, cta->clock.top);
    const bool restart = top > kLatest / 2;
    clock.serial = serial;
    clock.start = clock.floor = clock.top = restart ? 1 : top + 1;
    clock.engines = unsigned(cluster.ctas.size()) * cluster.stride;
    for (Cta* cta : cluster.ctas) {
        cta->clock.floor = clock.floor;
        for (const auto& fiber : cta->fibers) {
            if (restart) fiber->clock = {};
        }
        for (unsigned i = 0; i < cta->threads; ++i) {
            Clock& mine = cta->fibers[i]->clock;
            mine.seen.resize(std::max<size_t>(mine.seen.size(), clock.members()));
            mine.far = mine.news = false;
            set_time(*cta->fibers[i], clock.floor);
        }
    }
}

void leave_past(Past& past, Thread& thread, bool abroad) {
    const Clock& clock = thread.clock;
    const Cta& cta = *thread.cta;
    const unsigned warp = cta.first() + thread.warp() * kWarp;
    unsigned first = warp, last = warp + kWarp;
    if (clock.far || abroad) {
        first = 0;
        last = cta.cluster->clock.members();
    } else if (clock.beyond >= cta.clock.floor) {
        first = cta.first();
        last = first + cta.cluster->stride;
    }
    widen(past, first, last);
    join(past.seen.data(), clock.seen.data(), first, last);
    if (abroad) {
        int* own = past.seen.data() + cta.first();
        for (unsigned i = 0; i < cta.cluster->stride; ++i) {
            own[i] = std::max(own[i], cta.clock.floor - 1);
        }
    }
    past.far |= clock.far || abroad;
    past.seen[thread.member()] = time_of(clock.now);
    step(thread);
}

void take_past(const Past& past, Thread& thread) {
    Clock& clock = thread.clock;
    join(clock.seen.data(), past.seen.data(), past.first, past.last);
    const unsigned warp = thread.cta->first() + thread.warp() * kWarp;
    if (past.last > warp + kWarp || past.first < warp) clock.beyond = thread.cta->clock.floor;
    if (past.far) clock.far = clock.news = true;
}

Epoch engine_step(Cluster& cluster, unsigned engine) {
    return epoch_of(cluster, cluster.clock.engines + engine, ++cluster.clock.top);
}

void leave_engine(Past& past, const Cluster& cluster, Epoch engine) {
    const unsigned member = member_of(engine);
    widen(past, cluster.clock.engines, cluster.clock.members());
    past.seen[member] = std::max(past.seen[member], time_of(engine));
    past.far = true;
}

void fence_proxy(Thread& thread) {
    thread.fences.push_back(time_of(thread.clock.now));
    step(thread);
}

void order_cta(Cta& cta) {
    Cluster& cluster = *cta.cluster;
    cta.clock.floor = ++cluster.clock.top;
    if (cluster.ctas.size() == 1) cluster.clock.floor = cta.clock.floor;
    bool news = false;
    for (unsigned i = 0; i < cta.threads; ++i) {
        Thread& thread = *cta.fibers[i];
        set_time(thread, cta.clock.floor);
        news |= thread.clock.news;
        thread.clock.news = false;
    }
    if (!news) return;
    const auto threads = threads_of(cta);
    share(threads, 0, cta.first());
    share(threads, cta.first() + cluster.stride, cluster.clock.members());
}

void order_cluster(Cluster& cluster) {
    const int floor = ++cluster.clock.top;
    cluster.clock.floor = floor;
    bool far = false;
    std::vector<Thread*> threads;
    for (Cta* cta : cluster.ctas) {
        cta->clock.floor = floor;
        for (Thread* thread : threads_of(*cta)) {
            threads.push_back(thread);
            set_time(*thread, floor);
            far |= thread->clock.far;
            thread->clock.news = false;
        }
    }
    if (far) share(threads, cluster.clock.engines, cluster.clock.members());
}

void order_threads(const std::vector<Thread*>& threads) {
    static Past past;
    past.forget();
    for (Thread* thread : threads) leave_past(past, *thread);
    for (Thread* thread : threads) take_past(past, *thread);
}

bool comes_before(Epoch epoch, const Thread& thread) {
    const Cta& cta = *thread.cta;
    const unsigned member = member_of(epoch);
    if (member == thread.member()) return true;
    int floor = 0;
    if (member - cta.first() < cta.cluster->stride) {
        floor = cta.clock.floor;
    } else if (member < cta.cluster->clock.engines) {
        floor = cta.cluster->clock.floor;
    }
    return time_of(epoch) < floor || time_of(epoch) <= thread.clock.seen[member];
}

}  // namespace gk::emulator
