// Which thread has synchronised with which: vector clocks of the threads of a cluster, which is
// mostly one CTA.
//
// A thread's time steps whenever it synchronises. `seen[u]` is the latest time of thread u whose
// accesses come before what this thread does now. A `floor` is the time of the last barrier of all
// threads of a CTA, or of the cluster; whatever is older comes before everything. The asynchronous
// engine's writers are numbered after the threads, and no floor covers them. Times only grow, over
// all clusters of a slot, so that nothing is cleared between clusters. Clusters of one launch are
// never ordered; launches always are.
#pragma once

#include <cstdint>
#include <vector>

namespace gk::emulator {

struct Cluster;
struct Cta;
struct Thread;

// One thread between two synchronisations: 28 bits for its cluster's serial number, 14 for its
// index in the cluster, 22 for its time. 0 is nobody.
using Epoch = uint64_t;
constexpr unsigned kTimeBits = 22, kMemberBits = 14;
constexpr unsigned serial_of(Epoch epoch) { return unsigned(epoch >> (kTimeBits + kMemberBits)); }
constexpr unsigned member_of(Epoch epoch) {
    return unsigned(epoch >> kTimeBits) & ((1u << kMemberBits) - 1);
}
constexpr int time_of(Epoch epoch) { return int(epoch & ((1u << kTimeBits) - 1)); }
constexpr Epoch epoch_at(unsigned serial, unsigned member, int time) {
    return Epoch(serial) << (kTimeBits + kMemberBits) | Epoch(member) << kTimeBits | Epoch(time);
}
// The same thread at another time.
constexpr Epoch at_time(Epoch epoch, int time) {
    return epoch >> kTimeBits << kTimeBits | Epoch(time);
}

// The engine counts as a writer for each mbarrier and a reader for each warpgroup. Where there are
// more mbarriers or warpgroups than these numbers allow, some share one.
constexpr unsigned kWriters = 32, kEngines = 64;

struct Clock {
    Epoch now = 0;
    int beyond = 0;         // the floor when it last learned something of other warps
    bool far = false;       // whether it ever learned something of other CTAs or of the engine
    bool news = false;      // ... that not all threads of the CTA know
    std::vector<int> seen;  // by member of the cluster
};

struct CtaClock {
    int floor = 1;
    int top = 1;  // the latest time of all clusters that the slot was in, but the last
};

struct ClusterClock {
    unsigned serial = 0;          // grows over all launches
    int start = 1, floor = 1, top = 1;
    unsigned engines = 0;         // the first engine's index, after all threads in whole warps
    unsigned members() const { return engines + kEngines; }
};

// What threads leave at a barrier for the threads that wait there.
struct Past {
    unsigned first = 0, last = 0;  // it knows something of the members first ... last - 1
    bool far = false;
    std::vector<int> seen;
    void forget() {
        first = last = 0;
        far = false;
    }
};

Epoch epoch_of(const Cluster& cluster, unsigned member, int time);

// A cluster starts, as number `serial` of all clusters.
void start_clocks(Cluster& cluster, unsigned serial);
// What the thread did so far comes before everything that takes from `past` in its CTA or, if
// `abroad`, in any CTA of the cluster.
void leave_past(Past& past, Thread& thread, bool abroad = false);
void take_past(const Past& past, Thread& thread);
// The engine does something, as one of its writers or readers; and leaves that step in `past`.
Epoch engine_step(Cluster& cluster, unsigned engine);
void leave_engine(Past& past, const Cluster& cluster, Epoch engine);

// A proxy fence: the asynchronous engine may read what the thread wrote so far, for any thread that
// is ordered after the fence.
void fence_proxy(Thread& thread);

void order_cta(Cta& cta);
void order_cluster(Cluster& cluster);
void order_threads(const std::vector<Thread*>& threads);

// The epoch is one of the thread's own cluster.
bool comes_before(Epoch epoch, const Thread& thread);

}  // namespace gk::emulator
