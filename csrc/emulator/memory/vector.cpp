// The 16-byte accesses of kernels.
#include <cstring>

#include "emulator/memory/memory.h"

namespace gk::emulator {

void load_16(void* to, const void* from) {
    memory::read(from, 16, __builtin_return_address(0));
    std::memcpy(to, from, 16);
}

void store_16(void* to, const void* from) {
    memory::write(to, 16, __builtin_return_address(0));
    std::memcpy(to, from, 16);
}

}  // namespace gk::emulator
