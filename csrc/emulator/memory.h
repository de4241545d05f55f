// What the emulator knows of memory, and checks at every access.
#pragma once

#include <cstddef>

#include "grid.h"

namespace gk::emulator::memory {

// Tensors that the next launches may touch, until `forget`. Those not yet written may not be read
// before they are; those that are written may not be written again: they are a kernel's input.
void declare(const char* name, const void* begin, size_t bytes, bool written);
void forget();

// Of grid.cpp: the edges of a launch and of a CTA, and who waited for whom.
void launch_begin();
void launch_end();
void cta_begin(Cta& cta);
void cta_end(Cta& cta);
void order_cta(Cta& cta);
void order_threads(const std::vector<Thread*>& threads);

// A plain access by the running thread, at `pc` in the kernel.
void read(const void* address, size_t bytes, const void* pc);
void write(const void* address, size_t bytes, const void* pc);
void atomic(const void* address, size_t bytes, const void* pc);

}  // namespace gk::emulator::memory
