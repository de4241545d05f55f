#include "clock.h"

#include <algorithm>

#include "grid.h"

namespace gk::emulator {
namespace {

constexpr int kLatest = (1 << kTimeBits) - 1;

void set_time(Thread& thread, int time) {
    if (time == kLatest) fail("this CTA synchronised 4 million times, too often to follow");
    thread.clock.now = Epoch(thread.cta->clock.serial) << 32 | Epoch(thread.index) << kTimeBits |
                       Epoch(time);
}

void step(Thread& thread) {
    const int time = time_of(thread.clock.now) + 1;
    set_time(thread, time);
    thread.cta->clock.top = std::max(thread.cta->clock.top, time);
}

// Whole warps: a constant length is what g++ vectorises.
void join_warp(int* mine, const int* other) {
    for (unsigned i = 0; i < kWarp; ++i) mine[i] = mine[i] < other[i] ? other[i] : mine[i];
}

}  // namespace

void start_clocks(Cta& cta, unsigned serial) {
    CtaClock& clock = cta.clock;
    clock.serial = serial;
    const bool restart = clock.top > kLatest / 2;
    clock.floor = clock.top = restart ? 1 : clock.top + 1;
    const size_t threads = (cta.threads + kWarp - 1) / kWarp * kWarp;
    for (const auto& fiber : cta.fibers) {
        if (restart) fiber->clock = {};
    }
    for (unsigned i = 0; i < cta.threads; ++i) {
        Clock& mine = cta.fibers[i]->clock;
        mine.seen.resize(std::max(mine.seen.size(), threads));
        set_time(*cta.fibers[i], clock.floor);
    }
}

void leave_past(Past& past, Thread& thread) {
    const Clock& clock = thread.clock;
    const bool wide = clock.beyond >= thread.cta->clock.floor;
    const unsigned first = wide ? 0 : thread.warp() * kWarp;
    const unsigned last = wide ? (thread.cta->threads + kWarp - 1) / kWarp * kWarp : first + kWarp;
    if (past.seen.size() < last) past.seen.resize(last);
    if (past.last == 0) {
        std::fill(past.seen.begin() + first, past.seen.begin() + last, 0);
        past.first = first;
        past.last = last;
    }
    if (first < past.first) {
        std::fill(past.seen.begin() + first, past.seen.begin() + past.first, 0);
        past.first = first;
    }
    if (last > past.last) {
        std::fill(past.seen.begin() + past.last, past.seen.begin() + last, 0);
        past.last = last;
    }
    for (unsigned i = first; i < last; i += kWarp) join_warp(&past.seen[i], &clock.seen[i]);
    past.seen[thread.index] = time_of(clock.now);
    step(thread);
}

void take_past(const Past& past, Thread& thread) {
    Clock& clock = thread.clock;
    for (unsigned i = past.first; i < past.last; i += kWarp) {
        join_warp(&clock.seen[i], &past.seen[i]);
    }
    if (past.last - past.first > kWarp || past.first / kWarp != thread.warp()) {
        clock.beyond = thread.cta->clock.floor;
    }
}

void fence_proxy(Thread& thread) {
    thread.fences.push_back(time_of(thread.clock.now));
    step(thread);
}

void order_cta(Cta& cta) {
    cta.clock.floor = ++cta.clock.top;
    for (unsigned i = 0; i < cta.threads; ++i) set_time(*cta.fibers[i], cta.clock.floor);
}

void order_threads(const std::vector<Thread*>& threads) {
    static Past past;
    past.forget();
    for (Thread* thread : threads) leave_past(past, *thread);
    for (Thread* thread : threads) take_past(past, *thread);
}

}  // namespace gk::emulator
