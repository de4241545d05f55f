#include "emulator/async/bulk_checks.h"

#include <cstring>

#include "emulator/fiber/grid.h"
#include "emulator/memory/memory.h"

namespace gk::emulator {
namespace {

// The multiple at which a swizzle's pattern begins; the pattern repeats every eight rows of its
// span. Boxes start at a multiple of 128 in any case.
constexpr size_t alignment_of(Swizzle swizzle) {
    constexpr size_t kPatterns[] = {128, 256, 512, 1024};
    return kPatterns[static_cast<int>(swizzle)];
}

void check_multiple(const char* what, const char* of, uint64_t number, size_t multiple) {
    if (number % multiple == 0) return;
    fail(std::string(what) + " with " + of + " that is " + std::to_string(number % multiple) +
         " past a multiple of " + std::to_string(multiple));
}

}  // namespace

Map checked_map(const char* what, const TensorMap* map) {
    const char* stack = running->fiber.stack_begin();
    const auto address = reinterpret_cast<const char*>(map);
    const auto size = size_t(running->fiber.stack_end() - stack);
    Map held{};
    if (size_t(address - stack) > size - sizeof(TensorMap)) {
        fail(std::string(what) + " of a tensor map that is not among the kernel's parameters");
    }
    check_multiple(what, "a tensor map at an address", reinterpret_cast<uintptr_t>(map), 64);
    std::memcpy(&held, map, sizeof held);
    if (held.mark != kMapMark) {
        fail(std::string(what) + " of a tensor map that is none: tensor_map did not make it");
    }
    return held;
}

Box checked_box(const char* what, Access access, const TensorMap* map, const void* shared,
                const int* at, int rank) {
    const Map held = checked_map(what, map);
    if (held.rank != rank) {
        fail(std::string(what) + " at " + std::to_string(rank) +
             (rank == 1 ? " coordinate" : " coordinates") + " of a tensor of " +
             std::to_string(held.rank) + (held.rank == 1 ? " dimension" : " dimensions"));
    }
    size_t bytes = held.element;
    for (int i = 0; i < rank; ++i) bytes *= held.box[i];
    const size_t offset = memory::shared_offset(access, shared, bytes);
    check_multiple(what, "an address in shared memory", offset, alignment_of(held.swizzle));
    return box_of(held, at, offset);
}

Box checked_bytes(const char* what, Access access, void* global, const void* shared,
                  size_t bytes) {
    if (bytes == 0) fail(std::string(what) + " of 0 bytes");
    check_multiple(what, "a number of bytes", bytes, kChunk);
    check_multiple(what, "an address in global memory", reinterpret_cast<uintptr_t>(global),
                   kChunk);
    const size_t offset = memory::shared_offset(access, shared, bytes);
    check_multiple(what, "an address in shared memory", offset, kChunk);
    return box_of(global, bytes, offset);
}

}  // namespace gk::emulator
