// Work shared among threads: PyTorch's own, so that a kernel does not wait for another pool's
// threads to fall asleep, and the number that a user gives torch.set_num_threads holds.
//
// This module links no OpenMP. It looks for the library that the loaded libtorch_cpu.so was linked
// with. Where there is none, as on macOS, and in a child process after fork(), whose pool has no
// threads, the caller's thread does all the work.
#pragma once

#include <cstdint>

namespace gk::cpu {

// Threads that are worth it for so much work: bytes that pass through a thread's cache.
int worth(int threads, int64_t bytes);

// The path of the library whose threads are used, or "" where there is none.
const char* threads_library();

namespace detail {
void run(int64_t count, int threads, void (*body)(const void*, int64_t, int64_t), const void* data);
}

// Calls body(first, last) for parts of 0 ... count - 1 that cover it, at most `threads` of them at
// a time. The bits of a result must not depend on the parts. Denormal numbers count as 0 inside.
template <class Body>
void parallel_for(int64_t count, int threads, const Body& body) {
    detail::run(
        count, threads,
        [](const void* data, int64_t first, int64_t last) {
            (*static_cast<const Body*>(data))(first, last);
        },
        &body);
}

}  // namespace gk::cpu
