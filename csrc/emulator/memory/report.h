// Where in the source something happened, for error messages.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace gk::emulator {

struct Thread;

// Return addresses, innermost first.
using Calls = std::vector<const void*>;
// "csrc/device/vector.h:33, called at csrc/layer_norm.cu:120": the kernel's source lines.
std::string lines(const Calls& calls);
// Of the running thread, and of one that waits.
std::string here();
Calls calls_of(const Thread& waiting);
// Of the calls that the running thread is in: a number that differs where they do.
uint64_t path_here();
// As messages name a source file: from the project's folder on.
std::string short_path(const std::string& path);

// A place in the kernels' machine code in 28 bits.
unsigned pack_place(const void* pc);
const void* unpack_place(unsigned place);

}  // namespace gk::emulator
