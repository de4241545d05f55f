// The checks of every bulk copy when a thread starts it.
#pragma once

#include "emulator/memory/shadow.h"
#include "emulator/async/tma_map.h"

namespace gk::emulator {

// Fails if `map` is not a tensor map among the kernel's parameters.
Map checked_map(const char* what, const TensorMap* map);
// The box at the coordinates `at`, and at `shared` in shared memory, which `access` touches.
Box checked_box(const char* what, Access access, const TensorMap* map, const void* shared,
                const int* at, int rank);
// Contiguous bytes: both addresses and their number are multiples of 16.
Box checked_bytes(const char* what, Access access, void* global, const void* shared,
                  size_t bytes);

}  // namespace gk::emulator
