// Counters in global memory. They decide when something happens, but they order nothing for the
// race check: CTAs of one launch stay unordered, and reductions into global memory collide only
// with plain accesses.
#include "emulator/async/semaphore.h"

#include <string>

#include "emulator/fiber/grid.h"
#include "emulator/memory/memory.h"

namespace gk::emulator {
namespace {

struct Waiter {
    Thread* thread;
    const int* flag;
    int value;
};

std::vector<Waiter> waiters;

}  // namespace

void semaphore_wait(const int* flag, int value) {
    need_hopper("semaphore_wait");
    memory::atomic(flag, sizeof *flag, __builtin_return_address(0));
    if (*flag == value) return;
    waiters.push_back({running, flag, value});
    wait({"semaphore_wait", path_here()}, [flag, value] {
        return "for " + std::to_string(value) + " where " + std::to_string(*flag) + " is";
    });
}

void semaphore_release(int* flag, int add) {
    need_hopper("semaphore_release");
    bulk_stores_published("semaphore_release");
    memory::atomic(flag, sizeof *flag, __builtin_return_address(0));
    *flag += add;
    for (size_t i = 0; i < waiters.size();) {
        const Waiter waiter = waiters[i];
        if (waiter.flag != flag || waiter.value != *flag) {
            ++i;
            continue;
        }
        wake(*waiter.thread);
        waiters.erase(waiters.begin() + ptrdiff_t(i));
    }
}

void forget_semaphores() { waiters.clear(); }

}  // namespace gk::emulator
