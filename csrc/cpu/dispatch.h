// Which instruction set runs.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace gk::cpu {

// The instruction sets that the kernels are compiled for and this CPU has, the lowest first.
std::vector<std::string> instruction_sets();

// The kernels of the highest of them, or of the one that the last `use` named; of the one that the
// calling thread prefers, where it does. A launcher asks before its own threads start.
const Kernels& kernels();

// Throws std::invalid_argument where this CPU or this build does not have the instruction set.
void use(const std::string& isa);

// The same for calls of this thread alone; "" ends it.
void prefer(const std::string& isa);

}  // namespace gk::cpu
