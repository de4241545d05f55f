// cp.async: what is read or overwritten before the thread that copies has waited for it.
#include "cases.h"
#include "device/cp_async.h"
#include "device/vector.h"

namespace {

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

// Of 16 bytes from there, of which so many are valid, as a group of its own.
__device__ void start_copy(const float* from, int valid = 16) {
    gk::cp_async_16(arena() + 4 * threadIdx.x, from, valid);  // start_copy
    gk::cp_async_commit();
}

// Waits, and gives out what the same thread has copied.
__device__ void give_own(const Case& p) {
    gk::cp_async_wait<0>();
    gk::st128(p.b + 4 * threadIdx.x, gk::ld128(arena() + 4 * threadIdx.x));
}

GK_CASE(copy_without_wait) {
    start_copy(p.a + 4 * threadIdx.x);  // issued
    if (!p.broken) gk::cp_async_wait<0>();
    __syncthreads();
    give_next(p);  // copy_without_wait
}

GK_CASE(copy_without_barrier) {
    start_copy(p.a + 4 * threadIdx.x);  // without barrier
    gk::cp_async_wait<0>();
    if (!p.broken) __syncthreads();
    give_earlier(p);  // copy_without_barrier
}

// A group left open is not waited for.
GK_CASE(copy_without_commit) {
    gk::cp_async_16(arena() + 4 * threadIdx.x, p.a + 4 * threadIdx.x, 16);  // left open
    if (!p.broken) gk::cp_async_commit();
    gk::cp_async_wait<0>();
    __syncthreads();
    give_next(p);  // copy_without_commit
}

// Two groups, the second half of the data in the second.
GK_CASE(wait_short_by_one) {
    unsigned half = p.n / 2, i = 4 * threadIdx.x;  // n / 8 threads
    start_copy(p.a + i);
    gk::cp_async_16(arena() + half + i, p.a + half + i, 16);  // second group
    gk::cp_async_commit();
    gk::cp_async_wait<1>();
    gk::st128(p.b + i, gk::ld128(arena() + i));
    if (!p.broken) gk::cp_async_wait<0>();
    gk::st128(p.b + half + i, gk::ld128(arena() + half + i));  // wait_short_by_one
}

GK_CASE(write_into_copy) {
    unsigned i = 4 * threadIdx.x;
    start_copy(p.a + i);  // written into
    if (!p.broken) gk::cp_async_wait<0>();
    arena()[i + 1] = 7.0f;  // write_into_copy
    give_own(p);
}

// A stage is refilled while others may still read it.
GK_CASE(copy_into_read) {
    unsigned i = 4 * threadIdx.x;
    gk::st128(arena() + i, gk::ld128(p.a + i));
    __syncthreads();
    give_next(p);  // still reads
    if (!p.broken) __syncthreads();
    start_copy(p.a + i);  // copy_into_read
    gk::cp_async_wait<0>();
}

// c (n,) in and out: the source is written again while the copy may still read it.
GK_CASE(copy_source_changed) {
    unsigned i = 4 * threadIdx.x;
    auto c = static_cast<float*>(p.c);
    start_copy(c + i);
    if (!p.broken) gk::cp_async_wait<0>();
    c[i] = -1.0f;
    gk::cp_async_wait<0>();  // copy_source_changed
    give_own(p);
}

__attribute__((noinline, no_sanitize("thread"))) float look(const float* at) { return *at; }

// b (n / 4,) out: what lies where the copy will be, before it is waited for
GK_CASE(copy_looked_at) {
    unsigned i = 4 * threadIdx.x;
    gk::st128(arena() + i, gk::Pack<float, 4>{});
    start_copy(p.a + i);
    p.b[threadIdx.x] = look(arena() + i);
    gk::cp_async_wait<0>();
}

GK_CASE(copy_misaligned) {
    unsigned i = 4 * threadIdx.x;
    start_copy(p.a + i + p.broken);  // copy_misaligned
    give_own(p);
}

// c int32 (n / 4,): how many bytes of each 16 are valid
GK_CASE(copy_zero_fill) {
    unsigned i = 4 * threadIdx.x;
    start_copy(p.a + i, static_cast<const int*>(p.c)[threadIdx.x]);
    give_own(p);
}

GK_CASE(copy_past_end) {
    unsigned i = 4 * threadIdx.x;
    start_copy(p.a + i + (p.broken ? p.n : 0));  // copy_past_end
    give_own(p);
}

}  // namespace
