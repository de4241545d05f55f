// What the emulator knows of memory and checks at every access: the access lies within a tensor or
// the CTA's shared memory and is aligned; what is read was written; a kernel's inputs are not
// written; and two threads, one of which writes, do not touch one place with no barrier between.
//
// -fsanitize=thread makes g++ call a function before each access of a kernel; these functions are
// in emulator/memory/hooks.cpp.
#pragma once

#include <cstddef>
#include <string>

#include "emulator/fiber/grid.h"
#include "emulator/memory/shadow.h"

namespace gk::emulator::memory {

// Declares a tensor that the next launches may touch, until `forget`. A tensor that is not yet
// written may not be read before it is written. A tensor that is written is a kernel's input and
// may not be written again. A tensor that is declared as both is updated in place.
void declare(const char* name, const void* begin, size_t bytes, bool written);
void forget();

// For emulator/fiber/grid.cpp: a launch or a cluster begins, a thread has returned.
void launch_begin();
void cluster_begins(Cluster& cluster);
void thread_ends(const Thread& thread);

// A plain access by the running thread, at `pc` in the kernel. It must be aligned to its size.
void read(const void* address, size_t bytes, const void* pc);
void write(const void* address, size_t bytes, const void* pc);
void atomic(const void* address, size_t bytes, const void* pc);
// Accesses to any number of bytes, with an alignment of their own.
void read_range(const void* address, size_t bytes, size_t alignment, const void* pc);
void write_range(const void* address, size_t bytes, size_t alignment, const void* pc);
void atomic_range(const void* address, size_t bytes, size_t alignment, const void* pc);

// A cp.async writes 16 bytes of shared memory: nobody may touch them until the copy lands.
void copy_begin(const void* shared, const void* pc);
void copy_landed(const void* shared);

// Bulk copies by the asynchronous engine, which the running thread starts.
//
// The offset of `bytes` bytes in shared memory; fails if they lie outside of it. The offset holds
// for every CTA of the thread's cluster.
size_t shared_offset(Access access, const void* shared, size_t bytes);
// A write to shared memory of a CTA of the cluster, from `offset` on, or to a tensor. It is in
// flight until it lands. In shared memory the bytes then count as written by the engine that
// mbarrier_writer returns (emulator/async/asynchronous.h).
void bulk_begin(Cta& cta, size_t offset, size_t bytes, const void* pc);
void bulk_landed(const Cta& cta, size_t offset, size_t bytes, Epoch writer);
void bulk_begin(const void* global, size_t bytes, const void* pc);
void bulk_landed(const void* global, size_t bytes);
// A read of this CTA's shared memory, by a bulk copy or wgmma. Nobody may write there before the
// read is over, and the threads that wrote there must have fenced for the asynchronous proxy.
// `engine`: the engine that reads (emulator/fiber/clock.h); the read is over when somebody has
// waited for that engine.
void async_read(const void* shared, size_t bytes, const void* pc, Epoch engine = 0);
// A read of a tensor by a bulk copy: nobody may have written there by ordinary stores in this
// launch.
void async_read_tensor(const void* global, size_t bytes, const void* pc);
// The end of a read: nobody may have written there since `what`, at `pc`, was started.
void async_read_ends(const void* shared, size_t bytes, const char* what, const void* pc);

// 8 bytes become an mbarrier: ordinary accesses may not touch them any more.
void hold_mbarrier(Cta& cta, size_t offset, const void* pc);

// The running thread reaches into another CTA of its cluster. That CTA must be known to run, and
// may not return before it knows that the access is over.
void reach(Cta& cta, const void* pc);

// The thread of an epoch: "thread 3" if it is in the running thread's CTA, "thread 3 of CTA (1, 0,
// 0)", or "the asynchronous engine".
std::string name_of(Epoch epoch);

}  // namespace gk::emulator::memory
