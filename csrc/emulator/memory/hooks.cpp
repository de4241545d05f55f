// The functions that g++ calls before each access to memory with -fsanitize=thread; the sanitizer's
// own library is not linked. A thread's own stack holds its registers and local memory. Accesses to
// it need no check, unless a wgmma in flight has them as accumulators.
#include <cstdint>

#include "emulator/memory/memory.h"

namespace {

using namespace gk::emulator;

// Whether an access needs no further check: host code, which runs on no thread, or the thread's own
// stack.
inline bool exempt(const void* address, size_t bytes, const char* verb) {
    Thread* thread = running;
    if (thread == nullptr) return true;
    const Fiber& fiber = thread->fiber;
    const auto offset = size_t(static_cast<const char*>(address) - fiber.stack_begin());
    if (offset >= size_t(fiber.stack_end() - fiber.stack_begin())) return false;
    Touched& touched = thread->touched;
    if (touched.on() && !touched.access(offset, bytes)) {
        fail(std::string(verb) + " accumulators of a wgmma that has not been waited for");
    }
    return true;
}

inline void read(const void* address, size_t bytes, size_t alignment, const void* pc) {
    if (!exempt(address, bytes, "reads")) memory::read_range(address, bytes, alignment, pc);
}

inline void write(const void* address, size_t bytes, size_t alignment, const void* pc) {
    if (!exempt(address, bytes, "writes")) memory::write_range(address, bytes, alignment, pc);
}

}  // namespace

#define GK_HERE __builtin_return_address(0)

extern "C" {

void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}  // for exceptions, in launchers

void __tsan_read1(void* address) { read(address, 1, 1, GK_HERE); }
void __tsan_read2(void* address) { read(address, 2, 2, GK_HERE); }
void __tsan_read4(void* address) { read(address, 4, 4, GK_HERE); }
void __tsan_read8(void* address) { read(address, 8, 8, GK_HERE); }
// g++ calls this for structs aligned to 8 bytes too.
void __tsan_read16(void* address) { read(address, 16, 8, GK_HERE); }
void __tsan_write1(void* address) { write(address, 1, 1, GK_HERE); }
void __tsan_write2(void* address) { write(address, 2, 2, GK_HERE); }
void __tsan_write4(void* address) { write(address, 4, 4, GK_HERE); }
void __tsan_write8(void* address) { write(address, 8, 8, GK_HERE); }
void __tsan_write16(void* address) { write(address, 16, 8, GK_HERE); }
// For structs of other sizes, and for memcpy of up to 16 bytes.
void __tsan_read_range(void* address, long bytes) { read(address, size_t(bytes), 1, GK_HERE); }
void __tsan_write_range(void* address, long bytes) { write(address, size_t(bytes), 1, GK_HERE); }

// For guards of static variables, in launchers.
uint8_t __tsan_atomic8_load(const volatile uint8_t* address, int) {
    return __atomic_load_n(address, __ATOMIC_SEQ_CST);
}
}
