// Scheduling: which CTAs are resident, which thread runs next, and what is wrong when no thread can
// run.
#include "emulator/fiber/grid.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>

#include "runtime/launch.h"
#include "runtime/dry_run.h"
#include "runtime/resident.h"
#include "emulator/async/asynchronous.h"
#include "emulator/memory/memory.h"

namespace gk::emulator {

Thread* running = nullptr;
const Launch* launched = nullptr;

namespace {

constexpr unsigned kResident = 2;  // CTAs at a time; but only one cluster of several CTAs
constexpr unsigned kMostThreads = kMostWarps * kWarp;  // of a CTA
constexpr int kMultiprocessors = 2;

constexpr size_t kShared80 = 99 * 1024, kShared90 = 227 * 1024;  // of a CTA

bool hopper = false;  // whether this launch runs on Hopper
std::string failure;  // the error that ended the launch

struct Running {
    void* kernel;
    detail::Invoke invoke;
    const void* params;
} job;

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

// ---- how threads begin and end

std::vector<std::unique_ptr<Cta>> slots;
Cluster clusters[kResident];
unsigned char* arenas = nullptr;

// Room on both sides of each arena, so that an access past the arena's end stays within this
// mapping.
constexpr size_t kArenaBytes = 256 * 1024, kArenaMargin = 1024 * 1024;

void body() {
    job.invoke(job.kernel, job.params);
    Thread& self = *running;
    bulk_stores_end(self);
    self.done = true;
    Cta& cta = *self.cta;
    --cta.alive;
    cta.warps[self.warp()].alive &= ~(1u << self.lane());
    memory::thread_ends(self);
    leave_mbarriers(self);
    go_on_without(self);
    cluster_without(self);
    self.fiber.leave();
    std::abort();  // nobody enters a finished thread
}

void begin(Cta& cta, Cluster& cluster, unsigned rank) {
    cta.cluster = &cluster;
    cta.rank = rank;
    cta.block = block_of(cluster.number * launched->cluster + rank);
    cta.threads = cta.alive = launched->threads;
    for (Barrier& barrier : cta.barriers) barrier = {};
    cta.warpgroups.clear();
    cta.warps.assign((cta.threads + kWarp - 1) / kWarp, {});
    cta.mbarriers.clear();
    cta.visits.clear();
    cta.registers.clear();
    cta.passed.clear();
    cta.claims.clear();
    for (unsigned i = unsigned(cta.fibers.size()); i < cta.threads; ++i) {
        cta.fibers.push_back(std::make_unique<Thread>(i));
    }
    for (unsigned i = 0; i < cta.threads; ++i) {
        Thread& thread = *cta.fibers[i];
        thread.cta = &cta;
        thread.done = thread.arrived = false;
        thread.waiting = {};
        thread.more = nullptr;
        thread.copies = {};
        thread.fences.clear();
        thread.stores = {};
        thread.knows_running = 1u << rank;
        thread.touched.stop();
        thread.fiber.start(body);
        cta.warps[thread.warp()].alive |= 1u << thread.lane();
    }
}

void begin(Cluster& cluster, uint64_t number) {
    cluster.number = number;
    cluster.stride = (launched->threads + kWarp - 1) / kWarp * kWarp;
    cluster.mbarriers = 0;
    cluster.barrier = {};
    for (unsigned rank = 0; rank < cluster.ctas.size(); ++rank) {
        begin(*cluster.ctas[rank], cluster, rank);
    }
    memory::cluster_begins(cluster);
}

bool alive(const Cluster& cluster) {
    for (const Cta* cta : cluster.ctas) {
        if (cta->alive) return true;
    }
    return false;
}

// The cluster's slots may go to another cluster.
void end(Cluster& cluster) {
    for (Cta* cta : cluster.ctas) cta->clock.top = cluster.clock.top;
    cluster.ctas.clear();
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
    // Which of `count` things is next, in the order in which they began to wait.
    size_t next(size_t count) {
        if (seeded_) return random_() % count;
        return reverse_ ? count - 1 : 0;
    }
    // Whether something happens now although nobody waits for it.
    bool now_and_then() { return seeded_ && random_() % 4 == 0; }
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

std::string who_waits(const Cluster& cluster) {
    std::string report;
    for (const Cta* cta : cluster.ctas) {
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
            if (thread.more) what += " " + thread.more();
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

// The engine does one piece of work. If the work reveals a kernel's mistake, the launch ends.
void run_engine(Schedule& schedule) {
    try {
        engine_run(schedule.next(engine_pending()));
    } catch (const Error& error) {
        failure = error.what();
    }
}

// Called when all threads have returned.
void check_end(const Cluster& cluster) {
    for (const Cta* cta : cluster.ctas) {
        for (const std::string& wrong : {unfinished_mbarriers(*cta), uneven_registers(*cta)}) {
            if (wrong.empty() || !failure.empty()) continue;
            failure = std::string(launched->name) + " on " + launched->shape + ", CTA " +
                      text(cta->block) + ": " + wrong;
        }
    }
}

void run_grid(Schedule& schedule) {
    const Launch& launch = *launched;
    const uint64_t count =
        uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z / launch.cluster;
    uint64_t next = 0;
    const unsigned room = launch.cluster == 1 ? kResident : 1;
    std::vector<Cluster*> resident;
    while (failure.empty()) {
        for (unsigned i = 0; i < room && next < count; ++i) {
            Cluster& cluster = clusters[i];
            if (!cluster.ctas.empty()) continue;
            for (unsigned rank = 0; rank < launch.cluster; ++rank) {
                cluster.ctas.push_back(slots[i * launch.cluster + rank].get());
            }
            begin(cluster, next++);
            resident.push_back(&cluster);
        }
        if (resident.empty()) return;
        bool moved = false;
        for (const unsigned i : schedule.order(unsigned(resident.size()))) {
            const std::vector<Cta*>& ctas = resident[i]->ctas;
            for (const unsigned rank : schedule.order(unsigned(ctas.size()))) {
                Cta& cta = *ctas[rank];
                if (cta.alive == 0) continue;
                for (const unsigned warp : schedule.order((cta.threads + kWarp - 1) / kWarp)) {
                    moved |= run_warp(cta, warp, schedule.order(kWarp));
                    if (!failure.empty()) return;
                }
            }
        }
        if (engine_pending() && (!moved || schedule.now_and_then())) {
            run_engine(schedule);
            moved = true;
        }
        for (size_t i = resident.size(); i-- > 0 && failure.empty();) {
            if (alive(*resident[i])) continue;
            while (engine_pending() && failure.empty()) run_engine(schedule);
            if (failure.empty()) check_end(*resident[i]);
            end(*resident[i]);
            resident.erase(resident.begin() + ptrdiff_t(i));
        }
        if (!moved && failure.empty()) {
            failure = std::string(launch.name) + " on " + launch.shape +
                      ": deadlock, nobody can go on";
            for (const Cluster* cluster : resident) failure += who_waits(*cluster);
        }
    }
}

}  // namespace

std::string text(uint3 index) {
    return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
           std::to_string(index.z) + ")";
}

uint3 block_of(uint64_t number) {
    const uint64_t x = launched->grid.x, y = launched->grid.y;
    return make_uint3(unsigned(number % x), unsigned(number / x % y), unsigned(number / x / y));
}

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

void need_hopper(const char* what) {
    if (hopper) return;
    fail(std::string(what) + " needs compute capability 9.0, and GPTKERNELS_EMULATE_ARCH is sm80");
}

void wait(const Waiting& waiting, std::function<std::string()> more) {
    Thread* thread = running;
    thread->waiting = waiting;
    thread->more = std::move(more);
    thread->fiber.leave();
    thread->more = nullptr;
}

void wake(Thread& thread) { thread.waiting = {}; }

uint3 thread_index() { return make_uint3(running->index, 0, 0); }
uint3 block_index() { return running->cta->block; }
dim3 block_size() { return dim3(launched->threads); }
dim3 grid_size() { return launched->grid; }
unsigned char* shared_memory() { return running->cta->shared; }

}  // namespace gk::emulator

namespace gk {

int multiprocessors(int) {
    const DryRun* run = DryRun::elsewhere();
    return run != nullptr ? run->multiprocessors : emulator::kMultiprocessors;
}

int capability(int) {
    if (const DryRun* run = DryRun::elsewhere()) return run->capability;
    const char* name = std::getenv("GPTKERNELS_EMULATE_ARCH");
    const std::string given = name ? name : "sm80";
    if (given == "sm80") return 80;
    if (given == "sm90") return 90;
    throw Error("GPTKERNELS_EMULATE_ARCH must be sm80 or sm90, got " + given);
}

// Two, so that small inputs make persistent clusters take several rounds. The clusters run one
// after the other.
int detail::resident_clusters(const void*, const Launch& launch, int ctas_of_sm) {
    const DryRun* run = DryRun::elsewhere();
    if (run == nullptr) return 2;
    return std::max(1, run->multiprocessors * ctas_of_sm / static_cast<int>(launch.cluster));
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
    const auto refuse = [&](const std::string& reason) {
        throw Error(std::string(launch.name) + " on " + launch.shape + " asks for " + reason);
    };
    hopper = capability(launch.stream.device) >= 90;
    const size_t limit = hopper ? kShared90 : kShared80;
    if (launch.shared_bytes > limit) {
        refuse(std::to_string(launch.shared_bytes) + " bytes of shared memory, a CTA has " +
               std::to_string(limit));
    }
    const unsigned cluster = launch.cluster;
    if (cluster == 0 || cluster > kMostCtas || (cluster & (cluster - 1)) != 0) {
        refuse("clusters of " + std::to_string(cluster) + " CTAs, not 1, 2, 4 or 8");
    }
    if (cluster > 1 && !hopper) refuse("clusters, which compute capability 8.0 does not have");
    if (launch.grid.x % cluster != 0) {
        refuse("a grid of " + std::to_string(launch.grid.x) + " CTAs along x, in clusters of " +
               std::to_string(cluster));
    }
    if (arenas == nullptr) {
        const size_t bytes = kMostCtas * (kArenaBytes + kArenaMargin) + kArenaMargin;
        void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        arenas = static_cast<unsigned char*>(memory);
        for (unsigned i = 0; i < kMostCtas; ++i) {
            slots.push_back(std::make_unique<Cta>(i));
            slots[i]->shared = arenas + kArenaMargin + i * (kArenaBytes + kArenaMargin);
        }
    }
    Schedule schedule;
    job = {kernel, invoke, params};
    launched = &launch;
    failure.clear();
    choose_copies();
    engine_forget();
    forget_semaphores();
    for (Cluster& left : clusters) end(left);
    memory::launch_begin();
    run_grid(schedule);
    launched = nullptr;
    if (!failure.empty()) throw Error(failure);
}

}  // namespace gk
