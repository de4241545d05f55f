#include "cpu/parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>

namespace gk::cpu {
namespace {

// Numbers too small to be normal count as 0, in what is read and written: on some CPUs one takes as
// long as a hundred others.
class Flush {
  public:
#if defined(__x86_64__)
    Flush() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(before_ | 0x8040); }
    ~Flush() { __builtin_ia32_ldmxcsr(before_); }

  private:
    unsigned before_;
#elif defined(__aarch64__)
    Flush() {
        asm volatile("mrs %0, fpcr" : "=r"(before_));
        asm volatile("msr fpcr, %0" : : "r"(before_ | uint64_t{1} << 24));
    }
    ~Flush() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

  private:
    uint64_t before_;
#endif
    Flush(const Flush&) = delete;
};

// The functions of GNU's OpenMP library, which others offer too.
struct Pool {
    void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
    int (*inside)() = nullptr;  // whether this is a thread of the pool at work
    int (*number)() = nullptr;
    int (*threads)() = nullptr;
    const char* library = "";
};

Pool find_pool() {
    Pool pool;
    void* torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
    if (torch == nullptr) return pool;
    // Looks in the libraries that it was linked with, too.
    const auto find = [&](auto& function, const char* name) {
        function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(torch, name));
        return function != nullptr;
    };
    Pool found;
    Dl_info place;
    if (find(found.parallel, "GOMP_parallel") && find(found.inside, "omp_in_parallel") &&
        find(found.number, "omp_get_thread_num") && find(found.threads, "omp_get_num_threads") &&
        dladdr(reinterpret_cast<void*>(found.parallel), &place) != 0) {
        pool = found;
        pool.library = place.dli_fname;
    }
    return pool;
}

std::atomic<bool> forked{false};

const Pool& pool() {
    static const Pool found = [] {
        pthread_atfork(nullptr, nullptr, [] { forked = true; });
        return find_pool();
    }();
    return found;
}

struct Work {
    int64_t count;
    void (*body)(const void*, int64_t, int64_t);
    const void* data;

    void part(int64_t index, int64_t parts) const {
        const Flush flush;
        const int64_t first = count * index / parts, last = count * (index + 1) / parts;
        if (first < last) body(data, first, last);
    }
};

}  // namespace

namespace detail {

void run(int64_t count, int threads, void (*body)(const void*, int64_t, int64_t),
         const void* data) {
    const Work work{count, body, data};
    threads = static_cast<int>(std::min<int64_t>(threads, count));
    if (threads <= 1 || pool().parallel == nullptr || forked || pool().inside())
        return work.part(0, 1);
    pool().parallel(
        [](void* given) {
            static_cast<const Work*>(given)->part(pool().number(), pool().threads());
        },
        const_cast<Work*>(&work), static_cast<unsigned>(threads), 0);
}

}  // namespace detail

int worth(int threads, int64_t bytes) {
    constexpr int64_t kLeast = 32 * 1024;  // waking a thread takes about as long as this much work
    return static_cast<int>(std::clamp<int64_t>(bytes / kLeast, 1, threads));
}

const char* threads_library() { return pool().library; }

}  // namespace gk::cpu
