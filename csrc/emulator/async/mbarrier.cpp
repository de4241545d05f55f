// Barriers that count arrivals and bytes. The state that the hardware keeps in their 8 bytes is
// kept beside the CTA, where nobody can read it by accident.
#include "emulator/async/mbarrier.h"

#include "runtime/launch.h"
#include "emulator/async/asynchronous.h"
#include "emulator/fiber/cluster.h"
#include "emulator/fiber/grid.h"
#include "emulator/memory/memory.h"

namespace gk::emulator {
namespace {

constexpr unsigned kMostArrivals = (1u << 20) - 1;  // for arrivals and bytes: their fields' limit

std::string place(const Mbarrier& bar) { return lines({bar.pc}); }

std::string counted(int64_t count, const char* what) {
    return std::to_string(count) + " " + what + (count == 1 || count == -1 ? "" : "s");
}

// "in phase 3, 1 of 2 arrivals and 64 bytes to come, initialised at ..."
std::string state(const Mbarrier& bar) {
    return "in phase " + std::to_string(bar.phase) + ", " + std::to_string(bar.pending) + " of " +
           counted(bar.count, "arrival") + " and " + counted(bar.bytes, "byte") +
           " to come, initialised at " + place(bar);
}

size_t offset_of(const uint64_t* bar, const char* what) {
    need_hopper(what);
    const auto offset = size_t(reinterpret_cast<const unsigned char*>(bar) - shared_memory());
    if (offset >= launched->shared_bytes || launched->shared_bytes - offset < 8) {
        fail(std::string(what) + " is given an address outside of its CTA's shared memory");
    }
    if (offset % 8 != 0) {
        fail(std::string(what) + " is given byte " + std::to_string(offset) +
             " of shared memory, not a multiple of 8");
    }
    return offset;
}

std::string name(size_t offset) { return "the mbarrier at byte " + std::to_string(offset); }

Mbarrier& find(Cta& cta, size_t offset, const std::string& what) {
    const auto found = cta.mbarriers.find(offset);
    if (found == cta.mbarriers.end()) {
        fail(what + " names byte " + std::to_string(offset) + " of shared memory" +
             (running && running->cta == &cta ? "" : " of CTA " + text(cta.block)) +
             ", where no mbarrier has been initialised");
    }
    return found->second;
}

// Threads of the same CTA need no fence: any barrier after the initialisation is enough.
void check_fence(const Mbarrier& bar, size_t offset, const char* what) {
    if (bar.fenced) return;
    fail(std::string(what) + " may not see that " + memory::name_of(bar.initialised) +
         " has initialised " + name(offset) + " at " + place(bar) +
         ", which mbarrier_init_fence did not follow");
}

// A barrier of the running thread's CTA, or of another CTA that the thread reaches into.
Mbarrier& find_for_thread(Cta& cta, size_t offset, const char* what) {
    Mbarrier& bar = find(cta, offset, what);
    if (!comes_before(bar.initialised, *running)) {
        fail(std::string(what) + " may come before " + memory::name_of(bar.initialised) +
             " has initialised " + name(offset) + " at " + place(bar) + ": no barrier between");
    }
    if (&cta != running->cta) check_fence(bar, offset, what);
    return bar;
}

void complete(Mbarrier& bar, size_t offset) {
    if (bar.pending != 0) return;
    if (bar.bytes < 0) {
        fail(counted(-bar.bytes, "byte") + " more than expected come to " + name(offset) + ", " +
             state(bar));
    }
    if (bar.bytes > 0) return;
    ++bar.phase;
    bar.pending = bar.count;
    std::swap(bar.past, bar.completed);
    bar.past.forget();
    for (Thread* thread : bar.waiting) {
        take_past(bar.completed, *thread);
        wake(*thread);
    }
    bar.waiting.clear();
}

void expect(Mbarrier& bar, size_t offset, unsigned bytes, const char* what) {
    bar.bytes += bytes;
    if (bytes > kMostArrivals || bar.bytes > kMostArrivals) {
        fail(std::string(what) + " lets " + name(offset) + " expect " + std::to_string(bar.bytes) +
             " bytes, it counts up to " + std::to_string(kMostArrivals));
    }
}

void arrive(Cta& cta, size_t offset, unsigned bytes, const char* what) {
    Mbarrier& bar = find_for_thread(cta, offset, what);
    if (bar.pending == 0) {
        fail(std::string(what) + " is one arrival more than the " + std::to_string(bar.count) +
             " of each phase of " + name(offset) + ", " + state(bar));
    }
    expect(bar, offset, bytes, what);
    --bar.pending;
    leave_past(bar.past, *running, &cta != running->cta);
    complete(bar, offset);
}

}  // namespace

void mbarrier_init(uint64_t* address, unsigned count) {
    const char* what = "mbarrier_init";
    const size_t offset = offset_of(address, what);
    Cta& cta = *running->cta;
    const auto known = cta.mbarriers.find(offset);
    if (known != cta.mbarriers.end()) {
        fail(std::string(what) + " comes again to " + name(offset) + ", " + state(known->second));
    }
    if (count == 0 || count > kMostArrivals) {
        fail(std::string(what) + " counts " + std::to_string(count) + " arrivals, not 1 to " +
             std::to_string(kMostArrivals));
    }
    const void* pc = __builtin_return_address(0);
    memory::hold_mbarrier(cta, offset, pc);
    Mbarrier bar{};
    bar.count = bar.pending = count;
    bar.initialised = running->clock.now;
    bar.pc = pc;
    bar.engine = cta.cluster->mbarriers++ % kWriters;
    cta.mbarriers.emplace(offset, std::move(bar));
}

void mbarrier_init_fence() {
    need_hopper("mbarrier_init_fence");
    for (auto& [offset, bar] : running->cta->mbarriers) {
        bar.fenced |= member_of(bar.initialised) == running->member();
    }
}

void mbarrier_arrive(uint64_t* address) {
    const char* what = "mbarrier_arrive";
    arrive(*running->cta, offset_of(address, what), 0, what);
}

void mbarrier_arrive_expect_tx(uint64_t* address, unsigned bytes) {
    const char* what = "mbarrier_arrive_expect_tx";
    arrive(*running->cta, offset_of(address, what), bytes, what);
}

void mbarrier_expect_tx(uint64_t* address, unsigned bytes) {
    const char* what = "mbarrier_expect_tx";
    const size_t offset = offset_of(address, what);
    Mbarrier& bar = find_for_thread(*running->cta, offset, what);
    expect(bar, offset, bytes, what);
    complete(bar, offset);
}

void mbarrier_arrive_cluster(uint64_t* address, unsigned rank) {
    const char* what = "mbarrier_arrive_cluster";
    const size_t offset = offset_of(address, what);
    Cta& cta = cta_of_rank(rank, what);
    memory::reach(cta, __builtin_return_address(0));
    arrive(cta, offset, 0, what);
}

void mbarrier_wait(uint64_t* address, unsigned parity) {
    const char* what = "mbarrier_wait";
    const size_t offset = offset_of(address, what);
    if (parity > 1) fail(std::string(what) + " waits for parity " + std::to_string(parity));
    Mbarrier& bar = find_for_thread(*running->cta, offset, what);
    if ((bar.phase & 1) != parity) {
        take_past(bar.completed, *running);
        return;
    }
    bar.waiting.push_back(running);
    wait({what, path_here()}, [&bar, offset] {
        return "for parity " + std::to_string(bar.phase & 1) + " of " + name(offset) + " (" +
               state(bar) + ")";
    });
}

void mbarrier_for_copy(Cta& cta, size_t offset, const char* what) {
    check_fence(find_for_thread(cta, offset, what), offset, what);
}

Epoch mbarrier_writer(Cta& cta, size_t offset) {
    Mbarrier& bar = find(cta, offset, "an asynchronous copy");
    return bar.reported = engine_step(*cta.cluster, bar.engine);
}

void mbarrier_complete(Cta& cta, size_t offset, unsigned bytes) {
    Mbarrier& bar = find(cta, offset, "an asynchronous copy");
    if (bar.pending == 0 && bytes > bar.bytes) {
        fail("an asynchronous copy brings " + counted(bytes, "byte") + " to " + name(offset) +
             " of CTA " + text(cta.block) + ", which expects " + std::to_string(bar.bytes) +
             " more: " + state(bar));
    }
    bar.bytes -= bytes;
    if (bar.reported) leave_engine(bar.past, *cta.cluster, bar.reported);
    complete(bar, offset);
}

void leave_mbarriers(const Thread& thread) {
    for (auto& [offset, bar] : thread.cta->mbarriers) {
        if (bar.reported && comes_before(bar.reported, thread)) bar.waited_for = bar.reported;
    }
}

std::string unfinished_mbarriers(const Cta& cta) {
    for (const auto& [offset, bar] : cta.mbarriers) {
        if (bar.bytes != 0) {
            return "it returns and leaves " + name(offset) + " " + state(bar);
        }
        if (bar.reported != bar.waited_for) {
            return "it returns and nobody has waited for the last asynchronous copy that reports "
                   "to " + name(offset) + ", initialised at " + place(bar);
        }
    }
    return "";
}

}  // namespace gk::emulator
