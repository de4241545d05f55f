// Asynchronous copies, which land at once.
#include "cp_async.h"

#include "grid.h"
#include "memory.h"

namespace gk::emulator {

void cp_async_16(void* shared, const void* global, int bytes, Site site) {
    if (bytes < 0 || bytes > 16) {
        fail("cp.async copies " + std::to_string(bytes) + " bytes of 16", describe(site));
    }
    const void* pc = __builtin_return_address(0);
    if (bytes > 0) memory::read(global, size_t(bytes), pc);
    memory::write(shared, 16, pc);
    std::memcpy(shared, global, size_t(bytes));
    std::memset(static_cast<char*>(shared) + bytes, 0, size_t(16 - bytes));
}

void cp_async_commit() {}
void cp_async_wait(int) {}

}  // namespace gk::emulator
