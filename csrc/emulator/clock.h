// Who has synchronised with whom: vector clocks of the threads of a CTA.
//
// A thread's time steps whenever it synchronises. `seen[u]` is the latest time of thread u whose
// accesses come before what this thread does now; what is older than the CTA's `floor`, its last
// barrier of all threads, comes before everything. Times only grow, over all CTAs of a slot, so
// that nothing is cleared between them. CTAs of one launch are never ordered, launches always are.
#pragma once

#include <cstdint>
#include <vector>

namespace gk::emulator {

struct Cta;
struct Thread;

// One thread between two synchronisations: 32 bits of its CTA's serial number, 10 of its index, 22
// of its time. 0 is nobody.
using Epoch = uint64_t;
constexpr unsigned kTimeBits = 22;
constexpr unsigned serial_of(Epoch epoch) { return unsigned(epoch >> 32); }
constexpr unsigned thread_of(Epoch epoch) { return unsigned(epoch >> kTimeBits) & 1023; }
constexpr int time_of(Epoch epoch) { return int(epoch & ((1u << kTimeBits) - 1)); }
// The same thread at another time.
constexpr Epoch at_time(Epoch epoch, int time) {
    return epoch >> kTimeBits << kTimeBits | Epoch(time);
}

struct Clock {
    Epoch now = 0;
    int beyond = 0;         // when something was last learned of other warps
    std::vector<int> seen;  // by thread of the CTA
};

struct CtaClock {
    unsigned serial = 0;  // grows over all launches
    int floor = 1, top = 1;
};

// What threads leave at a barrier for those who wait there.
struct Past {
    unsigned first = 0, last = 0;  // the threads of whom it knows something
    std::vector<int> seen;
    void forget() { first = last = 0; }
};

// A CTA starts, as the `serial`th of all.
void start_clocks(Cta& cta, unsigned serial);
// What the thread did so far comes before whatever takes from `past`.
void leave_past(Past& past, Thread& thread);
void take_past(const Past& past, Thread& thread);

// A proxy fence: what the thread wrote so far may be read by the asynchronous engine for whoever
// comes after the fence.
void fence_proxy(Thread& thread);

void order_cta(Cta& cta);
void order_threads(const std::vector<Thread*>& threads);

}  // namespace gk::emulator
