// Where threads wait for each other: barriers of a CTA, collectives of a warp.
#include <algorithm>
#include <iterator>

#include "grid.h"
#include "memory.h"

namespace gk::emulator {
namespace {

void wait(Waiting waiting) {
    Thread* thread = running;
    thread->waiting = waiting;
    thread->fiber.leave();
}

void wake(Thread* thread) { thread->waiting = {}; }

bool complete(const Cta& cta, const Barrier& barrier) {
    const size_t here = barrier.waiting.size() + barrier.arrived.size();
    return here > 0 && here >= (barrier.expected ? barrier.expected : cta.alive);
}

void release(Cta& cta, Barrier& barrier) {
    if (barrier.expected == 0 || barrier.waiting.size() == cta.threads) {
        order_cta(cta);
    } else {
        for (Thread* thread : barrier.waiting) take_past(barrier.past, *thread);
    }
    barrier.past.forget();
    for (Thread* thread : barrier.waiting) wake(thread);
    barrier.waiting.clear();
    barrier.arrived.clear();
    std::fill(std::begin(barrier.sites), std::end(barrier.sites), Site{});
}

Barrier& join_barrier(unsigned number, unsigned threads, Site site, const char* what) {
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
    // bar.sync is .aligned: a warp's lanes arrive from one place.
    Site& there = barrier.sites[self.warp()];
    if (there.file == nullptr) there = site;
    if (there.line != site.line || std::strcmp(there.file, site.file) != 0) {
        fail(std::string(what) + " diverges: lanes of the same warp wait at " + describe(there));
    }
    return barrier;
}

bool same_place(const Waiting& a, const Waiting& b) {
    return a.mask == b.mask && a.site.line == b.site.line &&
           std::strcmp(a.what, b.what) == 0 && std::strcmp(a.site.file, b.site.file) == 0;
}

// One of those who wait there.
const Thread& first_lane(const Cta& cta, unsigned warp, const Meeting& meeting) {
    return *cta.fibers[warp * kWarp + unsigned(__builtin_ctz(meeting.here))];
}

// Everyone has come: combine, wake all but the running thread, forget the meeting.
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
        if (meeting.here >> lane & 1) wake(cta.fibers[warp * kWarp + lane].get());
    }
    return true;
}

}  // namespace

void go_on_without(const Thread& thread) {
    Cta& cta = *thread.cta;
    for (Barrier& barrier : cta.barriers) {
        if (barrier.expected == 0 && complete(cta, barrier)) release(cta, barrier);
    }
    for (size_t i = cta.warps[thread.warp()].meetings.size(); i-- > 0;) {
        finish(cta, thread.warp(), i);
    }
}

void barrier_sync(unsigned number, unsigned threads, Site site, const char* what) {
    Cta& cta = *running->cta;
    Barrier& barrier = join_barrier(number, threads, site, what);
    leave_past(barrier.past, *running);
    barrier.waiting.push_back(running);
    if (complete(cta, barrier)) {
        running->waiting = {};
        release(cta, barrier);
    } else {
        wait({what, site, 0, number});
    }
}

void barrier_arrive(unsigned number, unsigned threads, Site site) {
    Barrier& barrier = join_barrier(number, threads, site, "barrier_arrive");
    leave_past(barrier.past, *running);
    barrier.arrived.push_back(running);
    if (complete(*running->cta, barrier)) release(*running->cta, barrier);
}

void collective(const char* what, unsigned mask, void* data, Combine combine, Site site,
                bool whole) {
    Thread& self = *running;
    if (!(mask >> self.lane() & 1)) {
        fail(std::string(what) + " has mask " + hexadecimal(mask) + ", which leaves out lane " +
                 std::to_string(self.lane()) + ", its own");
    }
    const Waiting waiting{what, site, mask, 0};
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

// The source lane of PTX's shfl.sync, within segments of `width` lanes; a source outside the
// segment leaves the lane its own value.
void combine_shuffle(void* const* lanes) {
    for (int lane = 0; lane < int(kWarp); ++lane) {
        if (lanes[lane] == nullptr) continue;
        auto& mine = *static_cast<ShuffleLane*>(lanes[lane]);
        const int first = lane - lane % mine.width;
        int source = lane;
        switch (mine.kind) {
            case Shuffle::index:
                source = first + (mine.operand & (mine.width - 1));
                break;
            case Shuffle::up: source = lane - mine.operand; break;
            case Shuffle::down: source = lane + mine.operand; break;
            case Shuffle::exclusive: source = lane ^ mine.operand; break;
        }
        // As in the ISA: up stops at the segment's first lane, the others at its last.
        const bool outside = mine.kind == Shuffle::up ? source < first
                                                      : source >= first + mine.width;
        if (outside || source < 0) source = lane;
        // From a lane that does not take part the value is undefined: a pattern that shows.
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

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int operand, int width, Site site) {
    static constexpr const char* kNames[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync",
                                             "__shfl_xor_sync"};
    const char* name = kNames[int(kind)];
    if (width < 1 || width > int(kWarp) || (width & (width - 1))) {
        fail(std::string(name) + " has width " + std::to_string(width) +
                 ", which must be a power of two up to 32");
    }
    ShuffleLane lane{value, value, kind, operand, width};
    collective(name, mask, &lane, combine_shuffle, site);
    return lane.result;
}

unsigned ballot(const char* what, unsigned mask, bool predicate, Site site) {
    VoteLane lane{predicate, 0};
    collective(what, mask, &lane, combine_ballot, site);
    return lane.result;
}

void warp_sync(unsigned mask, Site site) {
    collective("__syncwarp", mask, running, combine_sync, site);
}

float atomic_add(float* address, float value) {
    memory::atomic(address, sizeof *address, __builtin_return_address(0));
    const float before = *address;
    *address = before + value;
    return before;
}

}  // namespace gk::emulator
