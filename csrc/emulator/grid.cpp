// Scheduling: which CTAs are resident, which thread runs next, and what is wrong when none can.
#include "grid.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>

#include "../launch.h"
#include "../plan.h"
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
    cta.warps[self.warp()].alive &= ~(1u << self.lane());
    go_on_without(self);
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
        thread.copies = {};
        thread.fences.clear();
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
        std::map<std::pair<std::string, Calls>, std::vector<unsigned>> places;
        std::vector<unsigned> returned;
        for (unsigned i = 0; i < cta->threads; ++i) {
            const Thread& thread = *cta->fibers[i];
            if (thread.done) {
                returned.push_back(i);
                continue;
            }
            const Waiting& w = thread.waiting;
            std::string what = w.what;
            if (w.mask) what += " with mask " + hexadecimal(w.mask);
            if (w.barrier) what += " on barrier " + std::to_string(w.barrier);
            places[{what, calls_of(thread)}].push_back(i);
        }
        report += "; CTA " + text(cta->block) + ":";
        const char* separator = " ";
        for (const auto& [place, threads] : places) {
            report += separator + ("threads " + ranges(threads)) + " wait in " + place.first +
                      " at " + lines(place.second);
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

std::string hexadecimal(unsigned mask) {
    char buffer[16];
    std::snprintf(buffer, sizeof buffer, "0x%08x", mask);
    return buffer;
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

}  // namespace gk::emulator

namespace gk {

int multiprocessors(int) {
    const Plan* plan = Plan::elsewhere();
    return plan != nullptr ? plan->multiprocessors : emulator::kMultiprocessors;
}

int capability(int) {
    if (const Plan* plan = Plan::elsewhere()) return plan->capability;
    const char* name = std::getenv("GPTKERNELS_EMULATE_ARCH");
    const std::string given = name ? name : "sm80";
    if (given == "sm80") return 80;
    if (given == "sm90") return 90;
    throw Error("GPTKERNELS_EMULATE_ARCH must be sm80 or sm90, got " + given);
}

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
    choose_copies();
    memory::launch_begin();
    run_grid(schedule);
    launched = nullptr;
    if (!failure.empty()) throw Error(failure);
}

}  // namespace gk
