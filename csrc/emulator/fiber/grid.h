// The emulated machine: a grid of CTAs, in which every thread is a fiber. This header is for the
// emulator's own files; kernels see only emulator/emulator.h.
//
// A thread runs until it has to wait: at a barrier, or at a collective of its warp until the other
// lanes arrive. Threads switch nowhere else, so whatever runs between two waits is atomic, and the
// schedule decides the order. A few CTAs are resident at a time; those of a cluster are resident
// together.
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

// What a thread waits for, and what it brought there.
struct Waiting {
    const char* what = nullptr;  // "__syncthreads", "mma.sync" ...; nullptr: it does not wait
    uint64_t path = 0;     // of the calls that led there
    unsigned mask = 0;     // of lanes, at a collective of the warp
    unsigned barrier = 0;  // the barrier's number
};

// An asynchronous copy to shared memory that its thread has not waited for.
struct Copy {
    void* shared;
    const void* global;
    int bytes;  // of 16; zeros follow
    unsigned char source[16];  // as it was when the copy was issued
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
    bool arrived = false;  // whether it has arrived at the cluster's barrier without waiting there
    unsigned arrived_at = 0;  // how often that barrier had been complete
    Waiting waiting;
    std::function<std::string()> more;  // says more about what it waits for, where there is more
    Clock clock;
    Copies copies;
    BulkStores stores;
    std::vector<int> fences;  // times at which it fenced the asynchronous proxy
    unsigned knows_running = 0;  // the CTAs of the cluster that it knows to run, a bit a rank
    Touched touched;
    unsigned lane() const { return index % kWarp; }
    unsigned warp() const { return index / kWarp; }
    unsigned member() const;  // within the cluster
};

// A collective in progress: the lanes that have come, and the data of each, which lies on its own
// stack.
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
    std::vector<Thread*> arrived;  // threads that do not wait
    unsigned expected = 0;         // threads; 0: every thread of the CTA that has not returned
    unsigned lanes[kMostWarps] = {};   // of each warp, those that have come
    uint64_t paths[kMostWarps] = {};   // of the calls that led each warp's first lane there
    Past past;                     // of the threads that came
};

// A barrier goes through one phase after another, counted from 0.
struct Mbarrier {
    unsigned count, pending;  // arrivals of a phase, and those yet to come
    int64_t bytes = 0;        // bytes yet to come
    unsigned phase = 0;
    Epoch initialised;
    const void* pc;        // where it was initialised
    unsigned engine;       // the number of the engine's writer that reports here
    bool fenced = false;   // whether the engine and other CTAs see it
    Epoch reported = 0;    // the engine's last step here
    Epoch waited_for = 0;  // the engine's last step that a thread knows of
    Past past, completed;  // of this phase, and of the one before
    std::vector<Thread*> waiting;
};

// A warp that asks for this many registers for each of its threads.
struct Claim {
    unsigned warp, registers;
};

// The last access by a thread of another CTA to a CTA's shared memory. The CTA may not return
// before it.
struct Visit {
    int time = 0;  // 0: there was none, or it is over
    const void* pc = nullptr;
};

struct Warpgroup;  // defined in emulator/mma/wgmma.cpp

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
    std::vector<unsigned> registers;       // a thread's, for each warp; empty: as at launch
    std::vector<std::vector<unsigned>> passed;  // the numbers that each warp has asked for
    std::vector<Claim> claims;                  // requests that wait until registers are free
    std::vector<std::shared_ptr<Warpgroup>> warpgroups;
    CtaClock clock;
    unsigned char* shared = nullptr;  // its arena, launch->shared_bytes of it in use
    unsigned first() const;           // the index of its first thread in the cluster
};

// barrier.cluster: each thread arrives, then waits.
struct ClusterBarrier {
    unsigned times = 0;  // how often it was complete
    unsigned arrived = 0;
    std::vector<Thread*> waiting;
    bool split = false;      // whether some threads do something else between the two
    Past past, completed;    // of the threads that have arrived; of the last time
    std::vector<uint64_t> paths;  // of the calls that led each warp's first lane there; 0: none
};

struct Cluster {
    uint64_t number = 0;  // within the grid
    std::vector<Cta*> ctas;
    unsigned stride = 0;  // a CTA's threads, rounded up to whole warps
    ClusterBarrier barrier;
    ClusterClock clock;
    unsigned mbarriers = 0;  // how many have been initialised
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
uint3 block_of(uint64_t number);  // the index of a CTA in the grid

// The running thread waits until it is woken. If there is a deadlock meanwhile, `more` adds to the
// error.
void wait(const Waiting& waiting, std::function<std::string()> more = {});
void wake(Thread& thread);

// In meetings.cpp and cluster.cpp: a thread has returned. Threads that waited for it wait no
// longer, or their wait is an error.
void go_on_without(const Thread& thread);
void cluster_without(Thread& thread);

void forget_semaphores();  // those of a launch that has failed
Cta& cta_of_rank(unsigned rank, const char* what);  // of the running thread's cluster

// In mbarrier.cpp and registers.cpp: what is wrong with how a CTA ends, or "" if nothing is.
void leave_mbarriers(const Thread& thread);  // a thread returns
std::string unfinished_mbarriers(const Cta& cta);
std::string uneven_registers(const Cta& cta);

}  // namespace gk::emulator
