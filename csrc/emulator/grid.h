// The emulated machine: a grid of CTAs, every thread a fiber. For the emulator's own files; kernels
// see emulator.h only.
//
// A thread runs until it has to wait: at a barrier, or at a collective of its warp until the other
// lanes arrive. Nothing else switches, so what runs between two waits is atomic, and the order is
// the schedule's. A few CTAs are resident at a time.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "clock.h"
#include "emulator.h"
#include "fiber.h"
#include "report.h"

namespace gk {
struct Launch;
}

namespace gk::emulator {

constexpr unsigned kWarp = 32;
constexpr unsigned kMostWarps = 32;  // of a CTA
constexpr unsigned kBarriers = 16;
constexpr size_t kSharedLimit = 99 * 1024;

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
    Waiting waiting;
    Clock clock;
    Copies copies;
    std::vector<int> fences;  // when it fenced the asynchronous proxy
    unsigned lane() const { return index % kWarp; }
    unsigned warp() const { return index / kWarp; }
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

struct Cta {
    explicit Cta(unsigned slot) : slot(slot) {}
    unsigned slot;       // among the resident CTAs
    uint64_t number = 0;  // within the grid
    uint3 block{};
    unsigned threads = 0;  // of which `alive` have not returned
    unsigned alive = 0;
    std::vector<std::unique_ptr<Thread>> fibers;  // at least `threads`, kept for the next CTA
    std::vector<Warp> warps;
    Barrier barriers[kBarriers];
    CtaClock clock;
    unsigned char* shared = nullptr;  // its arena, launch->shared_bytes of it in use
};

extern Thread* running;           // nullptr on the host's own stack
extern const Launch* launched;    // the launch in progress

// Ends the launch with an error of the running thread: "<kernel>, CTA (x, y, z), thread t, at
// csrc/file.cu:line: <sentence>". On the host's stack it throws.
[[noreturn]] void fail(const std::string& sentence, const std::string& where = here());
std::string hexadecimal(unsigned mask);

// Of cp_async.cpp: when copies arrive during this launch, by the environment.
void choose_copies();

// Of meetings.cpp: those who waited for a thread that has returned wait no longer, or must not.
void go_on_without(const Thread& thread);

}  // namespace gk::emulator
