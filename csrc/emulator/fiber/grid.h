// The emulated machine: a grid of CTAs, every thread a fiber. For the emulator's own files; kernels
// see emulator.h only.
//
// A thread runs until it has to wait: at a barrier, or at a collective of its warp until the other
// lanes arrive. Nothing else switches, so what runs between two waits is atomic, and the order is
// the schedule's. A few CTAs are resident at a time, those of a cluster together.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "emulator/async/bulk.h"
#include "emulator/fiber/clock.h"
#include "emulator/emulator.h"
#include "emulator/fiber/fiber.h"
#include "emulator/memory/report.h"
#include "emulator/memory/touched.h"

namespace gk {
struct Launch;
}

namespace gk::emulator {

constexpr unsigned kWarp = 32;
constexpr unsigned kMostWarps = 32;  // of a CTA
constexpr unsigned kBarriers = 16;
constexpr size_t kMostShared = 227 * 1024;  // of a CTA, on the largest machine
constexpr unsigned kMostCtas = 8;           // of a cluster

struct Cluster;
struct Cta;

// What a thread waits for, and what it brought.
struct Waiting {
    const char* what = nullptr;  // "__syncthreads", "mma.sync" ...; nullptr: it does not wait
    uint64_t path = 0;     // of calls that led there
    unsigned mask = 0;     // of lanes, at a collective of the warp
    unsigned barrier = 0;  // the barrier's number
};

// An asynchronous copy to shared memory that its thread has not waited for.
struct Copy {
    void* shared;
    const void* global;
    int bytes;  // of 16, zeros after them
    unsigned char source[16];  // when it was issued
};

// Copies in the order in which they were issued, and where each closed group of them ends.
struct Copies {
    std::vector<Copy> issued;
    std::vector<size_t> ends;
};

struct Thread {
    explicit Thread(unsigned index) : fiber(index), index(index) {}
    Fiber fiber;
    Cta* cta = nullptr;
    unsigned index;  // within the CTA
    bool done = false;
    bool arrived = false;  // at the cluster's barrier, without having waited there
    unsigned arrived_at = 0;  // which time
    Waiting waiting;
    std::function<std::string()> more;  // of what it waits for, where that says more
    Clock clock;
    Copies copies;
    BulkStores stores;
    std::vector<int> fences;  // when it fenced the asynchronous proxy
    unsigned knows_running = 0;  // CTAs of the cluster, by rank
    Touched touched;
    unsigned lane() const { return index % kWarp; }
    unsigned warp() const { return index / kWarp; }
    unsigned member() const;  // within the cluster
};

// A collective in progress: the lanes that have come, and what each brought, on its own stack.
struct Meeting {
    Waiting waiting;
    Combine combine;
    bool whole;
    unsigned here;
    void* data[kWarp];
};

struct Warp {
    unsigned alive = 0;  // lanes that have not returned
    std::vector<Meeting> meetings;
};

struct Barrier {
    std::vector<Thread*> waiting;
    std::vector<Thread*> arrived;  // without waiting
    unsigned expected = 0;         // threads; 0: every thread of the CTA that has not returned
    unsigned lanes[kMostWarps] = {};   // of each warp, who have come
    uint64_t paths[kMostWarps] = {};   // of the calls that led the first of them there
    Past past;                     // of those who came
};

// Of one phase after the other, counted from 0.
struct Mbarrier {
    unsigned count, pending;  // arrivals, and those yet to come
    int64_t bytes = 0;        // yet to come
    unsigned phase = 0;
    Epoch initialised;
    const void* pc;        // where it was
    unsigned engine;       // of the engine's writers, who reports here
    bool fenced = false;   // the engine and other CTAs see it
    Epoch reported = 0;    // what the engine did last
    Epoch waited_for = 0;  // ... that a thread knows of
    Past past, completed;  // of this phase, and of the one before
    std::vector<Thread*> waiting;
};

// A warp's, to registers for each of its threads.
struct Claim {
    unsigned warp, registers;
};

// The last access by a thread of another CTA to a CTA's shared memory, which must outlive it.
struct Visit {
    int time = 0;  // 0: none, or over
    const void* pc = nullptr;
};

struct Warpgroup;  // of wgmma.cpp

struct Cta {
    explicit Cta(unsigned slot) : slot(slot) {}
    unsigned slot;       // among the resident CTAs
    Cluster* cluster = nullptr;
    unsigned rank = 0;    // within the cluster
    uint3 block{};
    unsigned threads = 0;  // of which `alive` have not returned
    unsigned alive = 0;
    std::vector<std::unique_ptr<Thread>> fibers;  // at least `threads`, kept for the next CTA
    std::vector<Warp> warps;
    Barrier barriers[kBarriers];
    std::map<size_t, Mbarrier> mbarriers;  // by their offset in the arena
    std::vector<Visit> visits;             // by member of the cluster; empty: none
    std::vector<unsigned> registers;       // of a thread of each warp; empty: as at launch
    std::vector<std::vector<unsigned>> passed;  // what each warp has set them to
    std::vector<Claim> claims;                  // which wait until registers are free
    std::vector<std::shared_ptr<Warpgroup>> warpgroups;
    CtaClock clock;
    unsigned char* shared = nullptr;  // its arena, launch->shared_bytes of it in use
    unsigned first() const;           // of its threads, within the cluster
};

// barrier.cluster: each thread arrives, then waits.
struct ClusterBarrier {
    unsigned times = 0;  // it was complete
    unsigned arrived = 0;
    std::vector<Thread*> waiting;
    bool split = false;      // some do something else between the two
    Past past, completed;    // of those who have arrived; of the last time
    std::vector<uint64_t> paths;  // of calls that led the first lane of each warp there; 0: none
};

struct Cluster {
    uint64_t number = 0;  // within the grid
    std::vector<Cta*> ctas;
    unsigned stride = 0;  // a CTA's threads, in whole warps
    ClusterBarrier barrier;
    ClusterClock clock;
    unsigned mbarriers = 0;  // so far
};

inline unsigned Cta::first() const { return rank * cluster->stride; }
inline unsigned Thread::member() const { return cta->first() + index; }

extern Thread* running;           // nullptr on the host's own stack
extern const Launch* launched;    // the launch in progress

// Ends the launch with an error of the running thread: "<kernel>, CTA (x, y, z), thread t, at
// csrc/file.cu:line: <sentence>". On the host's stack it throws.
[[noreturn]] void fail(const std::string& sentence, const std::string& where = here());
std::string hexadecimal(unsigned mask);

// Fails unless the machine is Hopper: `what` needs it.
void need_hopper(const char* what);
std::string text(uint3 index);
uint3 block_of(uint64_t number);  // of the grid's CTAs

// The running thread waits until it is woken; `more` says what else there is to say meanwhile.
void wait(const Waiting& waiting, std::function<std::string()> more = {});
void wake(Thread& thread);

// Of meetings.cpp and cluster.cpp: those who waited for a thread that has returned wait no longer,
// or must not.
void go_on_without(const Thread& thread);
void cluster_without(Thread& thread);

void forget_semaphores();  // of a launch that has failed
Cta& cta_of_rank(unsigned rank, const char* what);  // of the running thread's cluster

// Of mbarrier.cpp and registers.cpp: what is wrong with how a CTA ends; "" for nothing.
void leave_mbarriers(const Thread& thread);  // a thread returns
std::string unfinished_mbarriers(const Cta& cta);
std::string uneven_registers(const Cta& cta);

}  // namespace gk::emulator
