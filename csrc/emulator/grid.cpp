// Scheduling: which thread runs next, who meets whom, and what is wrong when nobody can run.
#include "grid.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <random>
#include <stdexcept>

#include "../launch.h"
#include "memory.h"

namespace gk::emulator {

Thread* running = nullptr;
const Launch* launched = nullptr;

namespace {

constexpr unsigned kResident = 2;       // CTAs at a time
constexpr unsigned kMostThreads = kMostWarps * kWarp;  // of a CTA
constexpr int kMultiprocessors = 2;

std::string failure;  // what ended the launch

struct Running {
    void* kernel;
    detail::Invoke invoke;
    const void* params;
} job;

std::string text(uint3 index) {
    return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
           std::to_string(index.z) + ")";
}

// "0-31, 64": the threads' numbers, neighbours joined.
std::string ranges(const std::vector<unsigned>& numbers) {
    std::string joined;
    for (size_t i = 0; i < numbers.size();) {
        size_t last = i;
        while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
        joined += (joined.empty() ? "" : ", ") + std::to_string(numbers[i]);
        if (last > i) joined += "-" + std::to_string(numbers[last]);
        i = last + 1;
    }
    return joined;
}

std::string hexadecimal(unsigned mask) {
    char buffer[16];
    std::snprintf(buffer, sizeof buffer, "0x%08x", mask);
    return buffer;
}

void wait(Waiting waiting) {
    Thread* thread = running;
    thread->waiting = waiting;
    thread->fiber.leave();
}

void wake(Thread* thread) { thread->waiting = {}; }

// ---- barriers

bool complete(const Cta& cta, const Barrier& barrier) {
    const size_t here = barrier.waiting.size() + barrier.arrived.size();
    return here > 0 && here >= (barrier.expected ? barrier.expected : cta.alive);
}

void release(Cta& cta, Barrier& barrier) {
    if (barrier.expected == 0) {
        memory::order_cta(cta);
    } else {
        std::vector<Thread*> met = barrier.waiting;
        met.insert(met.end(), barrier.arrived.begin(), barrier.arrived.end());
        memory::order_threads(met);
    }
    for (Thread* thread : barrier.waiting) wake(thread);
    barrier.waiting.clear();
    barrier.arrived.clear();
    std::fill(std::begin(barrier.sites), std::end(barrier.sites), Site{});
}

Barrier& join_barrier(unsigned number, unsigned threads, Site site, const char* what) {
    Thread& self = *running;
    if (number >= kBarriers) {
        fail(std::string(what) + " names barrier " + std::to_string(number) + ", there are 16",
             describe(site));
    }
    if (threads % kWarp) {
        fail(std::string(what) + " is for " + std::to_string(threads) +
                 " threads, not a multiple of 32",
             describe(site));
    }
    Barrier& barrier = self.cta->barriers[number];
    if (barrier.waiting.empty() && barrier.arrived.empty()) barrier.expected = threads;
    if (barrier.expected != threads) {
        fail(std::string(what) + " brings " + std::to_string(threads) + " threads to barrier " +
                 std::to_string(number) + ", where others wait for " +
                 std::to_string(barrier.expected),
             describe(site));
    }
    // bar.sync is .aligned: a warp's lanes arrive from one place.
    Site& there = barrier.sites[self.warp()];
    if (there.file == nullptr) there = site;
    if (there.line != site.line || std::strcmp(there.file, site.file) != 0) {
        fail(std::string(what) + " diverges: lanes of the same warp wait at " + describe(there),
             describe(site));
    }
    return barrier;
}

// ---- collectives of a warp

bool same_place(const Waiting& a, const Waiting& b) {
    return a.mask == b.mask && a.site.line == b.site.line &&
           std::strcmp(a.what, b.what) == 0 && std::strcmp(a.site.file, b.site.file) == 0;
}

// Everyone has come: combine, wake all but the running thread, forget the meeting.
bool finish(Cta& cta, unsigned warp, size_t index) {
    std::vector<Meeting>& meetings = cta.warps[warp].meetings;
    if ((meetings[index].waiting.mask & cta.warps[warp].alive) != meetings[index].here) return false;
    const Meeting meeting = meetings[index];
    meetings.erase(meetings.begin() + ptrdiff_t(index));
    meeting.combine(meeting.data);
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        if (meeting.here >> lane & 1) wake(cta.fibers[warp * kWarp + lane].get());
    }
    return true;
}

// ---- threads' lives

std::vector<std::unique_ptr<Cta>> slots;
unsigned char* arenas = nullptr;

// Room on either side of each arena, so that an access past its end stays within this mapping.
constexpr size_t kArenaBytes = 256 * 1024, kArenaMargin = 1024 * 1024;

void body() {
    job.invoke(job.kernel, job.params);
    Thread& self = *running;
    self.done = true;
    Cta& cta = *self.cta;
    --cta.alive;
    // Those who waited for this thread wait no longer.
    for (Barrier& barrier : cta.barriers) {
        if (barrier.expected == 0 && complete(cta, barrier)) release(cta, barrier);
    }
    Warp& warp = cta.warps[self.warp()];
    warp.alive &= ~(1u << self.lane());
    for (size_t i = warp.meetings.size(); i-- > 0;) finish(cta, self.warp(), i);
    self.fiber.leave();
    std::abort();  // nobody enters a finished thread
}

void begin(Cta& cta, uint64_t number) {
    const Launch& launch = *launched;
    const uint64_t x = launch.grid.x, y = launch.grid.y;
    cta.number = number;
    cta.block = make_uint3(unsigned(number % x), unsigned(number / x % y),
                           unsigned(number / x / y));
    cta.threads = cta.alive = launch.threads;
    for (Barrier& barrier : cta.barriers) barrier = {};
    cta.warps.assign((cta.threads + kWarp - 1) / kWarp, {});
    for (unsigned i = unsigned(cta.fibers.size()); i < cta.threads; ++i) {
        cta.fibers.push_back(std::make_unique<Thread>(i));
    }
    for (unsigned i = 0; i < cta.threads; ++i) {
        Thread& thread = *cta.fibers[i];
        thread.cta = &cta;
        thread.done = false;
        thread.waiting = {};
        thread.fiber.start(body);
        cta.warps[thread.warp()].alive |= 1u << thread.lane();
    }
    memory::cta_begin(cta);
}

// ---- schedules

// The order in which CTAs, warps and lanes are offered a turn.
class Schedule {
  public:
    Schedule() {
        const char* name = std::getenv("GPTKERNELS_EMULATE_SCHEDULE");
        const std::string given = name ? name : "forward";
        if (given == "reverse") {
            reverse_ = true;
        } else if (given != "forward") {
            char* end = nullptr;
            random_.seed(std::strtoull(given.c_str(), &end, 10));
            seeded_ = true;
            if (given.empty() || *end) {
                throw Error("GPTKERNELS_EMULATE_SCHEDULE must be forward, reverse or a number, got " +
                            given);
            }
        }
    }
    std::vector<unsigned> order(unsigned count) {
        std::vector<unsigned> turns(count);
        for (unsigned i = 0; i < count; ++i) turns[i] = reverse_ ? count - 1 - i : i;
        if (seeded_) std::shuffle(turns.begin(), turns.end(), random_);
        return turns;
    }

  private:
    bool reverse_ = false, seeded_ = false;
    std::mt19937_64 random_;
};

bool run_warp(Cta& cta, unsigned warp, const std::vector<unsigned>& lanes) {
    bool moved = false;
    for (bool again = true; again && failure.empty();) {
        again = false;
        for (const unsigned lane : lanes) {
            const unsigned index = warp * kWarp + lane;
            if (index >= cta.threads) continue;
            Thread& thread = *cta.fibers[index];
            if (thread.done || thread.waiting.what != nullptr) continue;
            running = &thread;
            thread.fiber.enter();
            running = nullptr;
            if (!failure.empty()) return true;
            again = moved = true;
        }
    }
    return moved;
}

std::string who_waits(const std::vector<Cta*>& resident) {
    std::string report;
    for (const Cta* cta : resident) {
        std::map<std::string, std::vector<unsigned>> places;
        std::vector<unsigned> returned;
        for (unsigned i = 0; i < cta->threads; ++i) {
            const Thread& thread = *cta->fibers[i];
            if (thread.done) {
                returned.push_back(i);
                continue;
            }
            const Waiting& w = thread.waiting;
            std::string place = std::string(w.what) + " at " + describe(w.site);
            if (w.mask) place += " with mask " + hexadecimal(w.mask);
            if (w.barrier) place += " on barrier " + std::to_string(w.barrier);
            places[place].push_back(i);
        }
        report += "; CTA " + text(cta->block) + ":";
        const char* separator = " ";
        for (const auto& [place, threads] : places) {
            report += separator + ("threads " + ranges(threads)) + " wait in " + place;
            separator = ", ";
        }
        if (!returned.empty()) report += separator + ("threads " + ranges(returned)) + " returned";
    }
    return report;
}

void run_grid(Schedule& schedule) {
    const Launch& launch = *launched;
    const uint64_t ctas = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
    uint64_t next = 0;
    std::vector<Cta*> resident;
    while (failure.empty()) {
        for (auto& slot : slots) {
            const bool idle = std::find(resident.begin(), resident.end(), slot.get()) ==
                              resident.end();
            if (idle && next < ctas) {
                begin(*slot, next++);
                resident.push_back(slot.get());
            }
        }
        if (resident.empty()) return;
        bool moved = false;
        for (const unsigned i : schedule.order(unsigned(resident.size()))) {
            Cta& cta = *resident[i];
            for (const unsigned warp : schedule.order((cta.threads + kWarp - 1) / kWarp)) {
                moved |= run_warp(cta, warp, schedule.order(kWarp));
                if (!failure.empty()) return;
            }
        }
        for (size_t i = resident.size(); i-- > 0;) {
            if (resident[i]->alive == 0) {
                memory::cta_end(*resident[i]);
                resident.erase(resident.begin() + ptrdiff_t(i));
            }
        }
        if (!moved) {
            failure = std::string(launch.name) + " on " + launch.shape +
                      ": deadlock, nobody can go on" + who_waits(resident);
        }
    }
}

}  // namespace

std::string describe(const Site& site) {
    return std::string(site.file) + ":" + std::to_string(site.line);
}

void fail(const std::string& sentence, const std::string& where) {
    std::string whole = std::string(launched->name) + " on " + launched->shape;
    if (running == nullptr) throw Error(whole + ": " + sentence);
    whole += ", CTA " + text(running->cta->block) + ", thread " + std::to_string(running->index);
    failure = whole + ", at " + where + ": " + sentence;
    running->fiber.leave();
    std::abort();  // nobody enters a thread of a failed launch
}

uint3 thread_index() { return make_uint3(running->index, 0, 0); }
uint3 block_index() { return running->cta->block; }
dim3 block_size() { return dim3(launched->threads); }
dim3 grid_size() { return launched->grid; }
unsigned char* shared_memory() { return running->cta->shared; }

void barrier_sync(unsigned number, unsigned threads, Site site, const char* what) {
    Cta& cta = *running->cta;
    Barrier& barrier = join_barrier(number, threads, site, what);
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
    barrier.arrived.push_back(running);
    if (complete(*running->cta, barrier)) release(*running->cta, barrier);
}

void collective(const char* what, unsigned mask, void* data, Combine combine, Site site) {
    Thread& self = *running;
    if (!(mask >> self.lane() & 1)) {
        fail(std::string(what) + " has mask " + hexadecimal(mask) + ", which leaves out lane " +
                 std::to_string(self.lane()) + ", its own",
             describe(site));
    }
    const Waiting waiting{what, site, mask, 0};
    std::vector<Meeting>& meetings = self.cta->warps[self.warp()].meetings;
    size_t index = 0;
    while (index < meetings.size() && !(meetings[index].waiting.mask & mask)) ++index;
    if (index == meetings.size()) {
        meetings.push_back({waiting, combine, 0, {}});
    } else if (!same_place(meetings[index].waiting, waiting)) {
        const Waiting& there = meetings[index].waiting;
        fail(std::string(what) + " with mask " + hexadecimal(mask) + " diverges: lanes " +
                 hexadecimal(meetings[index].here) + " of the same warp are in " + there.what +
                 " with mask " + hexadecimal(there.mask) + " at " + describe(there.site),
             describe(site));
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
    memory::order_threads(met);
}

}  // namespace

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int operand, int width, Site site) {
    static constexpr const char* kNames[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync",
                                             "__shfl_xor_sync"};
    const char* name = kNames[int(kind)];
    if (width < 1 || width > int(kWarp) || (width & (width - 1))) {
        fail(std::string(name) + " has width " + std::to_string(width) +
                 ", which must be a power of two up to 32",
             describe(site));
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

namespace gk {

int multiprocessors(int) { return emulator::kMultiprocessors; }

void detail::launch(void* kernel, const Launch& launch, Invoke invoke, const void* params) {
    using namespace emulator;
    if (launch.threads == 0 || launch.threads > kMostThreads) {
        throw Error(std::string(launch.name) + " on " + launch.shape + " asks for " +
                    std::to_string(launch.threads) + " threads, a CTA has 1 to 1,024");
    }
    if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0 ||
        launch.grid.x > 0x7fffffffu || launch.grid.y > 65535 || launch.grid.z > 65535) {
        throw Error(std::string(launch.name) + " on " + launch.shape + " asks for a grid of (" +
                    std::to_string(launch.grid.x) + ", " + std::to_string(launch.grid.y) + ", " +
                    std::to_string(launch.grid.z) + ")");
    }
    if (launch.shared_bytes > kSharedLimit) {
        throw Error(std::string(launch.name) + " on " + launch.shape + " asks for " +
                    std::to_string(launch.shared_bytes) + " bytes of shared memory, a CTA has " +
                    std::to_string(kSharedLimit));
    }
    if (arenas == nullptr) {
        const size_t bytes = kResident * (kArenaBytes + kArenaMargin) + kArenaMargin;
        void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        arenas = static_cast<unsigned char*>(memory);
        for (unsigned i = 0; i < kResident; ++i) {
            slots.push_back(std::make_unique<Cta>(i));
            slots[i]->shared = arenas + kArenaMargin + i * (kArenaBytes + kArenaMargin);
        }
    }
    Schedule schedule;
    job = {kernel, invoke, params};
    launched = &launch;
    failure.clear();
    memory::launch_begin();
    run_grid(schedule);
    memory::launch_end();
    launched = nullptr;
    if (!failure.empty()) throw Error(failure);
}

}  // namespace gk
