// csrc/cpu/parallel.h on std::thread, for ThreadSanitizer: it cannot see the barriers of OpenMP's
// library.
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace gk::cpu {
namespace detail {

void run(int64_t count, int threads, void (*body)(const void*, int64_t, int64_t),
         const void* data) {
    std::vector<std::thread> all;
    for (int i = 0; i < threads; ++i)
        all.emplace_back(body, data, count * i / threads, count * (i + 1) / threads);
    for (std::thread& one : all) one.join();
}

}  // namespace detail

int worth(int threads, int64_t) { return threads; }

const char* threads_library() { return "std::thread"; }

}  // namespace gk::cpu
