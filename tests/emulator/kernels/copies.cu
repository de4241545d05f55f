// cp.async: what is read or overwritten before the thread that copies has waited for it.
#include "cases.h"
#include "device/cp_async.h"
#include "device/vector.h"

namespace {

__device__ float* arena() { return reinterpret_cast<float*>(gk::shared_memory()); }

// a (n,) in, b (n,) out, n floats of shared memory, n / 4 threads. Each copies four floats and
// gives out the four of another thread.
__device__ void give_next(const Case& p) {
    unsigned next = (threadIdx.x + 1) % (p.n / 4);
    gk::st128(p.b + 4 * threadIdx.x, gk::ld128(arena() + 4 * next));  // give_next
}

__device__ void give_earlier(const Case& p) {
    unsigned earlier = threadIdx.x ? threadIdx.x - 1 : 0;
    gk::st128(p.b + 4 * threadIdx.x, gk::ld128(arena() + 4 * earlier));  // give_earlier
}

__global__ void copy_without_wait(const Case p) {
    gk::cp_async_16(arena() + 4 * threadIdx.x, p.a + 4 * threadIdx.x, 16);  // issued
    gk::cp_async_commit();
    if (!p.broken) gk::cp_async_wait<0>();
    __syncthreads();
    give_next(p);  // copy_without_wait
}

__global__ void copy_without_barrier(const Case p) {
    gk::cp_async_16(arena() + 4 * threadIdx.x, p.a + 4 * threadIdx.x, 16);  // without barrier
    gk::cp_async_commit();
    gk::cp_async_wait<0>();
    if (!p.broken) __syncthreads();
    give_earlier(p);  // copy_without_barrier
}

// A group left open is not waited for.
__global__ void copy_without_commit(const Case p) {
    gk::cp_async_16(arena() + 4 * threadIdx.x, p.a + 4 * threadIdx.x, 16);  // left open
    if (!p.broken) gk::cp_async_commit();
    gk::cp_async_wait<0>();
    __syncthreads();
    give_next(p);  // copy_without_commit
}

// Two groups, the second half of the data in the second.
__global__ void wait_short_by_one(const Case p) {
    unsigned half = p.n / 2, i = 4 * threadIdx.x;  // n / 8 threads
    gk::cp_async_16(arena() + i, p.a + i, 16);
    gk::cp_async_commit();
    gk::cp_async_16(arena() + half + i, p.a + half + i, 16);  // second group
    gk::cp_async_commit();
    gk::cp_async_wait<1>();
    gk::st128(p.b + i, gk::ld128(arena() + i));
    if (!p.broken) gk::cp_async_wait<0>();
    gk::st128(p.b + half + i, gk::ld128(arena() + half + i));  // wait_short_by_one
}

__global__ void write_into_copy(const Case p) {
    unsigned i = 4 * threadIdx.x;
    gk::cp_async_16(arena() + i, p.a + i, 16);  // written into
    gk::cp_async_commit();
    if (!p.broken) gk::cp_async_wait<0>();
    arena()[i + 1] = 7.0f;  // write_into_copy
    gk::cp_async_wait<0>();
    gk::st128(p.b + i, gk::ld128(arena() + i));
}

// A stage is refilled while others may still read it.
__global__ void copy_into_read(const Case p) {
    unsigned i = 4 * threadIdx.x;
    gk::st128(arena() + i, gk::ld128(p.a + i));
    __syncthreads();
    give_next(p);  // still reads
    if (!p.broken) __syncthreads();
    gk::cp_async_16(arena() + i, p.a + i, 16);  // copy_into_read
    gk::cp_async_commit();
    gk::cp_async_wait<0>();
}

// c (n,) in and out: the source is written again while the copy may still read it.
__global__ void copy_source_changed(const Case p) {
    unsigned i = 4 * threadIdx.x;
    auto c = static_cast<float*>(p.c);
    gk::cp_async_16(arena() + i, c + i, 16);
    gk::cp_async_commit();
    if (!p.broken) gk::cp_async_wait<0>();
    c[i] = -1.0f;
    gk::cp_async_wait<0>();  // copy_source_changed
    gk::st128(p.b + i, gk::ld128(arena() + i));
}

__attribute__((noinline, no_sanitize("thread"))) float look(const float* at) { return *at; }

// b (n / 4,) out: what lies where the copy will be, before it is waited for
__global__ void copy_looked_at(const Case p) {
    unsigned i = 4 * threadIdx.x;
    gk::st128(arena() + i, gk::Pack<float, 4>{});
    gk::cp_async_16(arena() + i, p.a + i, 16);
    gk::cp_async_commit();
    p.b[threadIdx.x] = look(arena() + i);
    gk::cp_async_wait<0>();
}

__global__ void copy_misaligned(const Case p) {
    unsigned i = 4 * threadIdx.x;
    gk::cp_async_16(arena() + i, p.a + i + p.broken, 16);  // copy_misaligned
    gk::cp_async_commit();
    gk::cp_async_wait<0>();
    gk::st128(p.b + i, gk::ld128(arena() + i));
}

// c int32 (n / 4,): how many bytes of each 16 are valid
__global__ void copy_zero_fill(const Case p) {
    unsigned i = 4 * threadIdx.x;
    gk::cp_async_16(arena() + i, p.a + i, static_cast<const int*>(p.c)[threadIdx.x]);
    gk::cp_async_commit();
    gk::cp_async_wait<0>();
    gk::st128(p.b + i, gk::ld128(arena() + i));
}

__global__ void copy_past_end(const Case p) {
    unsigned i = 4 * threadIdx.x;
    gk::cp_async_16(arena() + i, p.a + i + (p.broken ? p.n : 0), 16);  // copy_past_end
    gk::cp_async_commit();
    gk::cp_async_wait<0>();
    gk::st128(p.b + i, gk::ld128(arena() + i));
}

}  // namespace

const NamedCase kCopyCases[] = {
    {"copy_without_wait", copy_without_wait},
    {"copy_without_barrier", copy_without_barrier},
    {"copy_without_commit", copy_without_commit},
    {"wait_short_by_one", wait_short_by_one},
    {"write_into_copy", write_into_copy},
    {"copy_into_read", copy_into_read},
    {"copy_source_changed", copy_source_changed},
    {"copy_looked_at", copy_looked_at},
    {"copy_misaligned", copy_misaligned},
    {"copy_zero_fill", copy_zero_fill},
    {"copy_past_end", copy_past_end},
    {nullptr, nullptr},
};
