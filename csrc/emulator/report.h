// Where in the source something happened, for error messages.
#pragma once

#include <string>
#include <vector>

namespace gk::emulator {

// "csrc/device/vector.h:33, called at csrc/layer_norm.cu:120": the place from which the running
// thread called the emulator at `pc`, and its callers up to the kernel.
std::string here(const void* pc);
// The same of a place that was left, as far as functions were inlined into each other.
std::string place(const void* pc);
// As messages name a source file: from the project's folder on.
std::string short_path(const std::string& path);

// A place in the kernels' machine code in 28 bits.
unsigned pack_place(const void* pc);
const void* unpack_place(unsigned place);

}  // namespace gk::emulator
