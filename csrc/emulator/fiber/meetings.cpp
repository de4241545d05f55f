// Where threads wait for each other: barriers of a CTA, collectives of a warp.
#include <algorithm>
#include <iterator>

#include "emulator/fiber/grid.h"
#include "emulator/memory/memory.h"

namespace gk::emulator {
namespace {

// The lanes that exist in a warp of the CTA.
unsigned all_lanes(const Cta& cta, unsigned warp) {
    const unsigned threads = std::min(cta.threads - warp * kWarp, kWarp);
    return 0xffffffffu >> (kWarp - threads);
}

// A barrier for a number of threads counts warps, and a warp has come when all its lanes have.
bool complete(const Cta& cta, const Barrier& barrier) {
    const size_t here = barrier.waiting.size() + barrier.arrived.size();
    if (barrier.expected == 0) return here > 0 && here >= cta.alive;
    if (here < barrier.expected && cta.threads % kWarp == 0) return false;
    unsigned threads = 0;
    for (unsigned warp = 0; warp < cta.warps.size(); ++warp) {
        if (barrier.lanes[warp] == all_lanes(cta, warp)) threads += kWarp;
    }
    return threads >= barrier.expected;
}

// Where a thread of the warp waits, for errors.
std::string place_of(const Barrier& barrier, unsigned warp) {
    for (const Thread* thread : barrier.waiting) {
        if (thread->warp() == warp) return "wait at " + lines(calls_of(*thread));
    }
    return "have arrived elsewhere";
}

[[noreturn]] void fail_returned(const Barrier& barrier, const char* what, unsigned number,
                                unsigned returned) {
    fail(std::string(what) + " on barrier " + std::to_string(number) + ", for " +
             std::to_string(barrier.expected) + " threads, needs whole warps, and lanes " +
             hexadecimal(returned) + " have returned",
         running->done && !barrier.waiting.empty() ? lines(calls_of(*barrier.waiting[0])) : here());
}

void release(Cta& cta, Barrier& barrier) {
    if (barrier.expected != 0) {
        for (unsigned warp = 0; warp < cta.warps.size(); ++warp) {
            const unsigned missing = all_lanes(cta, warp) & ~barrier.lanes[warp];
            if (barrier.lanes[warp] == 0 || missing == 0) continue;
            fail("the barrier is complete, and lanes " + hexadecimal(missing) + " of warp " +
                 std::to_string(warp) + " have not come, the others " + place_of(barrier, warp));
        }
    }
    if (barrier.expected == 0 || barrier.waiting.size() == cta.threads) {
        order_cta(cta);
    } else {
        for (Thread* thread : barrier.waiting) take_past(barrier.past, *thread);
    }
    barrier.past.forget();
    for (Thread* thread : barrier.waiting) wake(*thread);
    barrier.waiting.clear();
    barrier.arrived.clear();
    std::fill(std::begin(barrier.lanes), std::end(barrier.lanes), 0);
}

Barrier& join_barrier(unsigned number, unsigned threads, uint64_t path, const char* what) {
    Thread& self = *running;
    if (number >= kBarriers) {
        fail(std::string(what) + " names barrier " + std::to_string(number) + ", there are 16");
    }
    if (threads % kWarp) {
        fail(std::string(what) + " is for " + std::to_string(threads) +
                 " threads, not a multiple of 32");
    }
    Barrier& barrier = self.cta->barriers[number];
    if (barrier.waiting.empty() && barrier.arrived.empty()) barrier.expected = threads;
    if (barrier.expected != threads) {
        fail(std::string(what) + " brings " + std::to_string(threads) + " threads to barrier " +
                 std::to_string(number) + ", where others wait for " +
                 std::to_string(barrier.expected));
    }
    const unsigned warp = self.warp();
    unsigned& lanes = barrier.lanes[warp];
    if (lanes >> self.lane() & 1) {
        fail(std::string(what) + " comes again to barrier " + std::to_string(number) +
             ", which its first arrival has not completed");
    }
    // bar.sync is .aligned: a warp's lanes arrive from one place.
    if (lanes == 0) barrier.paths[warp] = path;
    if (barrier.paths[warp] != path) {
        fail(std::string(what) + " diverges: lanes of the same warp " + place_of(barrier, warp));
    }
    lanes |= 1u << self.lane();
    const unsigned returned = all_lanes(*self.cta, warp) & ~self.cta->warps[warp].alive & ~lanes;
    if (threads != 0 && returned != 0) fail_returned(barrier, what, number, returned);
    return barrier;
}

bool same_place(const Waiting& a, const Waiting& b) {
    return a.mask == b.mask && a.path == b.path && std::strcmp(a.what, b.what) == 0;
}

// One of the lanes that wait at the meeting.
const Thread& first_lane(const Cta& cta, unsigned warp, const Meeting& meeting) {
    return *cta.fibers[warp * kWarp + unsigned(__builtin_ctz(meeting.here))];
}

// If all lanes have come: calls combine, wakes all lanes, and drops the meeting. Returns whether
// they had come.
bool finish(Cta& cta, unsigned warp, size_t index) {
    std::vector<Meeting>& meetings = cta.warps[warp].meetings;
    if ((meetings[index].waiting.mask & cta.warps[warp].alive) != meetings[index].here) return false;
    const Meeting meeting = meetings[index];
    if (meeting.whole && ~meeting.here) {
        fail(std::string(meeting.waiting.what) + " needs the whole warp, and lanes " +
                 hexadecimal(~meeting.here) + " have returned",
             running->done ? lines(calls_of(first_lane(cta, warp, meeting))) : here());
    }
    meetings.erase(meetings.begin() + ptrdiff_t(index));
    meeting.combine(meeting.data);
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        if (meeting.here >> lane & 1) wake(*cta.fibers[warp * kWarp + lane]);
    }
    return true;
}

}  // namespace

void go_on_without(const Thread& thread) {
    Cta& cta = *thread.cta;
    for (Barrier& barrier : cta.barriers) {
        if (barrier.expected == 0) {
            if (complete(cta, barrier)) release(cta, barrier);
        } else if (barrier.lanes[thread.warp()] != 0 &&
                   !(barrier.lanes[thread.warp()] >> thread.lane() & 1)) {
            const auto number = unsigned(&barrier - cta.barriers);
            fail_returned(barrier, "a wait", number, 1u << thread.lane());
        }
    }
    for (size_t i = cta.warps[thread.warp()].meetings.size(); i-- > 0;) {
        finish(cta, thread.warp(), i);
    }
}

void barrier_sync(unsigned number, unsigned threads, const char* what) {
    Cta& cta = *running->cta;
    const uint64_t path = path_here();
    Barrier& barrier = join_barrier(number, threads, path, what);
    leave_past(barrier.past, *running);
    barrier.waiting.push_back(running);
    if (complete(cta, barrier)) {
        running->waiting = {};
        release(cta, barrier);
    } else {
        wait({what, path, 0, number});
    }
}

void barrier_arrive(unsigned number, unsigned threads) {
    if (threads == 0) fail("barrier_arrive does not say for how many threads");
    Barrier& barrier = join_barrier(number, threads, path_here(), "barrier_arrive");
    leave_past(barrier.past, *running);
    barrier.arrived.push_back(running);
    if (complete(*running->cta, barrier)) release(*running->cta, barrier);
}

void collective(const char* what, unsigned mask, void* data, Combine combine, bool whole) {
    Thread& self = *running;
    if (!(mask >> self.lane() & 1)) {
        fail(std::string(what) + " has mask " + hexadecimal(mask) + ", which leaves out lane " +
                 std::to_string(self.lane()) + ", its own");
    }
    const Waiting waiting{what, path_here(), mask, 0};
    std::vector<Meeting>& meetings = self.cta->warps[self.warp()].meetings;
    size_t index = 0;
    while (index < meetings.size() && !(meetings[index].waiting.mask & mask)) ++index;
    if (index == meetings.size()) {
        meetings.push_back({waiting, combine, whole, 0, {}});
    } else if (!same_place(meetings[index].waiting, waiting)) {
        const Waiting& there = meetings[index].waiting;
        fail(std::string(what) + " with mask " + hexadecimal(mask) + " diverges: lanes " +
                 hexadecimal(meetings[index].here) + " of the same warp are in " + there.what +
                 " with mask " + hexadecimal(there.mask) + " at " +
                 lines(calls_of(first_lane(*self.cta, self.warp(), meetings[index]))));
    }
    meetings[index].here |= 1u << self.lane();
    meetings[index].data[self.lane()] = data;
    self.waiting = waiting;
    if (!finish(*self.cta, self.warp(), index)) self.fiber.leave();
}

namespace {

struct ShuffleLane {
    uint64_t value, result;
    Shuffle kind;
    int operand, width;
};

// The source lane is that of PTX's shfl.sync, within segments of `width` lanes. If the source lies
// outside the segment, the lane keeps its own value.
void combine_shuffle(void* const* lanes) {
    for (int lane = 0; lane < int(kWarp); ++lane) {
        if (lanes[lane] == nullptr) continue;
        auto& mine = *static_cast<ShuffleLane*>(lanes[lane]);
        const int first = lane - lane % mine.width;
        const int operand = mine.operand & 31;  // shfl.sync takes only these bits of it
        int source = lane;
        switch (mine.kind) {
            case Shuffle::index:
                source = first + (operand & (mine.width - 1));
                break;
            case Shuffle::up: source = lane - operand; break;
            case Shuffle::down: source = lane + operand; break;
            case Shuffle::exclusive: source = lane ^ operand; break;
        }
        // As in the ISA: up stops at the segment's first lane, the others at its last.
        const bool outside = mine.kind == Shuffle::up ? source < first
                                                      : source >= first + mine.width;
        if (outside || source < 0) source = lane;
        // The value of a lane that does not take part is undefined, so a conspicuous pattern is
        // returned.
        mine.result = lanes[source] ? static_cast<ShuffleLane*>(lanes[source])->value
                                    : 0xffffffffffffffffull;
    }
}

struct VoteLane {
    bool predicate;
    unsigned result;
};

void combine_ballot(void* const* lanes) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        if (lanes[lane] && static_cast<VoteLane*>(lanes[lane])->predicate) votes |= 1u << lane;
    }
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        if (lanes[lane]) static_cast<VoteLane*>(lanes[lane])->result = votes;
    }
}

void combine_sync(void* const* lanes) {
    std::vector<Thread*> met;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        if (lanes[lane]) met.push_back(static_cast<Thread*>(lanes[lane]));
    }
    order_threads(met);
}

}  // namespace

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int operand, int width) {
    static constexpr const char* kNames[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync",
                                             "__shfl_xor_sync"};
    const char* name = kNames[int(kind)];
    if (width < 1 || width > int(kWarp) || (width & (width - 1))) {
        fail(std::string(name) + " has width " + std::to_string(width) +
                 ", which must be a power of two up to 32");
    }
    ShuffleLane lane{value, value, kind, operand, width};
    collective(name, mask, &lane, combine_shuffle);
    return lane.result;
}

unsigned ballot(const char* what, unsigned mask, bool predicate) {
    VoteLane lane{predicate, 0};
    collective(what, mask, &lane, combine_ballot);
    return lane.result;
}

void warp_sync(unsigned mask) {
    collective("__syncwarp", mask, running, combine_sync);
}

float atomic_add(float* address, float value) {
    memory::atomic(address, sizeof *address, __builtin_return_address(0));
    const float before = *address;
    *address = before + value;
    return before;
}

}  // namespace gk::emulator
