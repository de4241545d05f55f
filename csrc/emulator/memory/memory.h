// What the emulator knows of memory, and checks at every access: that it lies within a tensor or
// the CTA's shared memory and is aligned, that what is read was written, that a kernel's inputs are
// not, and that two threads, one of them writing, do not touch one place with no barrier between.
//
// -fsanitize=thread makes g++ call a function before each access of a kernel; hooks.cpp has those
// functions.
#pragma once

#include <cstddef>
#include <string>

#include "emulator/fiber/grid.h"
#include "emulator/memory/shadow.h"

namespace gk::emulator::memory {

// Tensors that the next launches may touch, until `forget`. Those not yet written may not be read
// before they are; those that are written may not be written again: they are a kernel's input.
// One declared both ways is updated in place.
void declare(const char* name, const void* begin, size_t bytes, bool written);
void forget();

// Of grid.cpp: a launch or a cluster begins, a thread has returned.
void launch_begin();
void cluster_begins(Cluster& cluster);
void thread_ends(const Thread& thread);

// A plain access by the running thread, at `pc` in the kernel. Its size is its alignment.
void read(const void* address, size_t bytes, const void* pc);
void write(const void* address, size_t bytes, const void* pc);
void atomic(const void* address, size_t bytes, const void* pc);
// Any number of bytes, with an alignment of their own.
void read_range(const void* address, size_t bytes, size_t alignment, const void* pc);
void write_range(const void* address, size_t bytes, size_t alignment, const void* pc);
void atomic_range(const void* address, size_t bytes, size_t alignment, const void* pc);

// 16 bytes of shared memory that a cp.async writes: nobody may touch them until it lands.
void copy_begin(const void* shared, const void* pc);
void copy_landed(const void* shared);

// Bulk copies by the asynchronous engine, which the running thread starts.
//
// `bytes` of shared memory of a CTA of the thread's cluster, as an offset. Fails outside.
size_t shared_offset(Access access, const void* shared, size_t bytes);
// A write to shared memory of a CTA of the cluster, from `offset` on, or to a tensor: in flight
// until it lands. In shared memory it is then the engine's, as mbarrier_writer says (asynchronous.h).
void bulk_begin(Cta& cta, size_t offset, size_t bytes, const void* pc);
void bulk_landed(const Cta& cta, size_t offset, size_t bytes, Epoch writer);
void bulk_begin(const void* global, size_t bytes, const void* pc);
void bulk_landed(const void* global, size_t bytes);
// A read of this CTA's shared memory, by a bulk copy or wgmma: nobody may write there before it is
// over, and what threads wrote there they have fenced for the asynchronous proxy.
// `engine`: one of the engine's own (clock.h), which is over when somebody waited for that.
void async_read(const void* shared, size_t bytes, const void* pc, Epoch engine = 0);
// The same of a tensor, by a bulk copy: nobody may have written there by ordinary stores in this
// launch.
void async_read_tensor(const void* global, size_t bytes, const void* pc);
// The same when it is over: nobody may have written there since `what`, at `pc`, was started.
void async_read_ends(const void* shared, size_t bytes, const char* what, const void* pc);

// 8 bytes that become an mbarrier: they are no longer for ordinary accesses.
void hold_mbarrier(Cta& cta, size_t offset, const void* pc);

// The running thread reaches into another CTA of its cluster. That one must be known to run, and
// may not return before it knows that this is over.
void reach(Cta& cta, const void* pc);

// "thread 3" of the running thread's CTA, "thread 3 of CTA (1, 0, 0)", "the asynchronous engine".
std::string name_of(Epoch epoch);

}  // namespace gk::emulator::memory
