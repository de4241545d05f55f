// The asynchronous engine: what the tensor memory accelerator does by itself, some time after a
// thread has asked for it.
//
// A copy into shared memory goes in three steps. When a thread asks for it, memory::bulk_begin
// checks that the thread may overwrite those bytes; from then on nobody may touch them. Its work,
// which `later` keeps, moves the bytes, declares memory::bulk_landed as whom mbarrier_writer says,
// and takes them off the barrier by mbarrier_complete. Who then waits there may read them, and no
// one else. With GPTKERNELS_EMULATE_COPIES=late that happens when no thread can go on, in the order
// of the schedule (oldest, newest, or any, and at random moments too); with `early` at once.
#pragma once

#include <cstddef>
#include <functional>

#include "emulator/fiber/clock.h"

namespace gk::emulator {

// Does the work some time before its CTA's memory goes to another one. What fails in it has no
// running thread: `fail` then names the kernel alone.
void later(std::function<void()> work);

// The running thread names a barrier to `what`, a copy that will report there: it must be initialised
// for the thread and, by mbarrier_init_fence, for the engine.
void mbarrier_for_copy(Cta& cta, size_t barrier, const char* what);

// Of barriers in the shared memory of `cta`, at their offset there. The engine is somebody else for
// each barrier: who has waited at one knows nothing of what is reported at others.
Epoch mbarrier_writer(Cta& cta, size_t barrier);
void mbarrier_complete(Cta& cta, size_t barrier, unsigned bytes);

// Of asynchronous.cpp, for grid.cpp and cp_async.cpp.
void choose_copies();  // by the environment, at each launch
bool copies_early();
size_t engine_pending();
void engine_run(size_t which);
void engine_forget();

}  // namespace gk::emulator
