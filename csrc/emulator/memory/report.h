// Where in the source something happened, for error messages.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace gk::emulator {

struct Thread;

// Return addresses, innermost first.
using Calls = std::vector<const void*>;
// The kernel's source lines: "csrc/device/vector.h:33, called at csrc/layer_norm/fwd.cu:120".
std::string lines(const Calls& calls);
// The source lines of the running thread, and the calls of a thread that waits.
std::string here();
Calls calls_of(const Thread& waiting);
// A number for the chain of calls that the running thread is in: other chains have other numbers.
uint64_t path_here();
// A source file as messages name it: from the project's folder on.
std::string short_path(const std::string& path);

// A place in the kernels' machine code in 28 bits.
unsigned pack_place(const void* pc);
const void* unpack_place(unsigned place);

}  // namespace gk::emulator
