// Bulk copies between their start and their end, for the emulator's own files.
#pragma once

#include <memory>
#include <vector>

namespace gk::emulator {

struct Thread;
struct BulkStore;

// A thread's stores and reductions in the order in which it started them, and where each closed
// group of them ends.
struct BulkStores {
    std::vector<std::shared_ptr<BulkStore>> started;
    std::vector<size_t> ends;
};

// The running thread is about to tell others, by `what`, about its writes to global memory. Fails
// if its stores may still write there.
void bulk_stores_published(const char* what);
// A thread returns. Fails if it has not waited until its stores have read their shared memory.
void bulk_stores_end(const Thread& thread);

}  // namespace gk::emulator
