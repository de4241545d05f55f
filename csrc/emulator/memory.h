// What the emulator knows of memory, and checks at every access: that it lies within a tensor or
// the CTA's shared memory and is aligned, that what is read was written, that a kernel's inputs are
// not, and that two threads, one of them writing, do not touch one place with no barrier between.
//
// -fsanitize=thread makes g++ call a function before each access of a kernel; hooks.cpp has those
// functions.
#pragma once

#include <cstddef>

#include "grid.h"
#include "shadow.h"

namespace gk::emulator::memory {

// Tensors that the next launches may touch, until `forget`. Those not yet written may not be read
// before they are; those that are written may not be written again: they are a kernel's input.
// One declared both ways is updated in place.
void declare(const char* name, const void* begin, size_t bytes, bool written);
void forget();

// Of grid.cpp: a launch or a CTA begins.
void launch_begin();
void cta_begin(Cta& cta);

// A plain access by the running thread, at `pc` in the kernel. Its size is its alignment.
void read(const void* address, size_t bytes, const void* pc);
void write(const void* address, size_t bytes, const void* pc);
void atomic(const void* address, size_t bytes, const void* pc);
// Any number of bytes, with an alignment of their own.
void read_range(const void* address, size_t bytes, size_t alignment, const void* pc);
void write_range(const void* address, size_t bytes, size_t alignment, const void* pc);

// 16 bytes of shared memory that an asynchronous copy writes: nobody may touch them until it lands.
void copy_begin(const void* shared, const void* pc);
void copy_landed(const void* shared);

// Bulk copies by the asynchronous engine, which the running thread starts.
//
// `bytes` of shared memory of a CTA of the thread's cluster, as an offset. Fails outside.
size_t shared_offset(Access access, const void* shared, size_t bytes);
// A write to shared memory of a CTA, from `offset` on, or to a tensor: in flight until it lands.
void bulk_begin(const Cta& cta, size_t offset, size_t bytes, const void* pc);
void bulk_landed(const Cta& cta, size_t offset, size_t bytes);
void bulk_begin(const void* global, size_t bytes, const void* pc);
void bulk_landed(const void* global, size_t bytes);
// A read of this CTA's shared memory, by a bulk copy or wgmma: nobody may write there before it is
// over, and what threads wrote there they have fenced for the asynchronous proxy.
void async_read(const void* shared, size_t bytes, const void* pc);

}  // namespace gk::emulator::memory
