// The asynchronous engine: the work that the tensor memory accelerator does by itself, some time
// after a thread has asked for it.
//
// A copy into shared memory goes in three steps. First a thread asks for it: memory::bulk_begin
// checks that the thread may overwrite the bytes, and from then on nobody may touch them. Then the
// work, which `later` keeps, moves the bytes, declares them landed by memory::bulk_landed with the
// writer that mbarrier_writer returns, and takes them off the barrier by mbarrier_complete. Last, a
// thread that waits at the barrier may read the bytes, and no other thread may. With
// GPTKERNELS_EMULATE_COPIES=late the work happens when no thread can go on, in the order of the
// schedule (oldest, newest, or any, and then at random moments too); with `early` it happens at
// once.
#pragma once

#include <cstddef>
#include <functional>

#include "emulator/fiber/clock.h"

namespace gk::emulator {

// Does the work some time before its CTA's memory goes to another CTA. An error in the work has no
// running thread: `fail` then names only the kernel.
void later(std::function<void()> work);

// The running thread names a barrier to `what`, a copy that will report there. The barrier must be
// initialised for the thread and, by mbarrier_init_fence, for the engine.
void mbarrier_for_copy(Cta& cta, size_t barrier, const char* what);

// For the barrier at offset `barrier` in the shared memory of `cta`. The engine counts as a
// separate thread for each barrier: a thread that has waited at one barrier knows nothing of what
// is reported at others.
Epoch mbarrier_writer(Cta& cta, size_t barrier);
void mbarrier_complete(Cta& cta, size_t barrier, unsigned bytes);

// Defined in asynchronous.cpp, for emulator/fiber/grid.cpp and emulator/async/cp_async.cpp.
void choose_copies();  // by the environment, at each launch
bool copies_early();
size_t engine_pending();
void engine_run(size_t which);
void engine_forget();

}  // namespace gk::emulator
