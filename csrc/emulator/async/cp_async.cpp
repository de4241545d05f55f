// Asynchronous copies. Data arrives when its thread waits for it, as late as the GPU may deliver
// it; with GPTKERNELS_EMULATE_COPIES=early it arrives at once. In both cases nobody may touch the
// destination in between.
#include "emulator/async/cp_async.h"

#include <cstring>

#include "emulator/async/asynchronous.h"
#include "emulator/fiber/grid.h"
#include "emulator/memory/memory.h"
#include "emulator/memory/report.h"

namespace gk::emulator {
namespace {

void deliver(const Copy& copy) {
    const size_t bytes = size_t(copy.bytes);
    if (bytes > 0) std::memcpy(copy.shared, copy.global, bytes);
    std::memset(static_cast<char*>(copy.shared) + bytes, 0, 16 - bytes);
}

}  // namespace

void cp_async_16(void* shared, const void* global, int bytes) {
    const void* pc = __builtin_return_address(0);
    if (bytes < 0 || bytes > 16) {
        fail("cp.async copies " + std::to_string(bytes) + " bytes of 16");
    }
    const auto past = reinterpret_cast<uintptr_t>(global) % 16;
    if (past != 0) {
        fail("cp.async reads at an address that is " + std::to_string(past) +
                 " past a multiple of 16");
    }
    if (bytes > 0) memory::read_range(global, size_t(bytes), 1, pc);
    memory::copy_begin(shared, pc);
    Copy copy{shared, global, bytes, {}};
    if (bytes > 0) std::memcpy(copy.source, global, size_t(bytes));
    if (copies_early()) deliver(copy);
    running->copies.issued.push_back(copy);
}

void cp_async_commit() {
    Copies& copies = running->copies;
    copies.ends.push_back(copies.issued.size());
}

void cp_async_wait(int pending) {
    Copies& copies = running->copies;
    if (copies.ends.size() <= size_t(pending)) return;
    const size_t groups = copies.ends.size() - size_t(pending);
    const size_t landed = copies.ends[groups - 1];
    for (size_t i = 0; i < landed; ++i) {
        const Copy& copy = copies.issued[i];
        if (copy.bytes > 0 && std::memcmp(copy.source, copy.global, size_t(copy.bytes)) != 0) {
            fail("the source of a cp.async has changed before it was waited for");
        }
        if (!copies_early()) deliver(copy);
        memory::copy_landed(copy.shared);
    }
    copies.issued.erase(copies.issued.begin(), copies.issued.begin() + ptrdiff_t(landed));
    copies.ends.erase(copies.ends.begin(), copies.ends.begin() + ptrdiff_t(groups));
    for (size_t& end : copies.ends) end -= landed;
}

}  // namespace gk::emulator
