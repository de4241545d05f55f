// Two threads at one place, one of them writing, with no barrier between.
#include "cases.h"
#include "device/vector.h"

namespace {

// a (n,) in, b (n,) out, n floats of shared memory, n threads
GK_CASE(read_after_write) {
    unsigned i = threadIdx.x;
    arena()[i] = p.a[i];  // wrote
    if (!p.broken) __syncthreads();
    p.b[i] = arena()[i ? i - 1 : 0];  // read_after_write
}

GK_CASE(write_after_read) {
    unsigned i = threadIdx.x;
    arena()[i] = p.a[i];
    __syncthreads();
    p.b[i] = arena()[(i + 1) % p.n];  // has read
    if (!p.broken) __syncthreads();
    arena()[i] = 0.0f;  // write_after_read
}

GK_CASE(write_after_write) {
    if (p.broken || threadIdx.x == 0) arena()[0] = p.a[threadIdx.x];  // write_after_write
    __syncthreads();
    p.b[threadIdx.x] = arena()[0];
}

// Thread 1 reads one of four floats, thread 2 all four and writes the one.
GK_CASE(part_and_whole) {
    unsigned i = threadIdx.x;
    if (i == 0) gk::st128(arena(), gk::ld128(p.a));
    __syncthreads();
    if (i == 1) p.b[0] = arena()[3];  // part
    if (!p.broken) __syncthreads();
    if (i == 2) {
        p.b[1] = gk::ld128(arena()).at[3];
        arena()[3] = 0.0f;  // part_and_whole
    }
}

// Lanes of a warp exchange through shared memory: __syncwarp orders them, a shuffle does not.
GK_CASE(lanes) {
    unsigned i = threadIdx.x;
    arena()[i] = p.a[i];  // lane wrote
    if (p.broken) {
        __shfl_xor_sync(0xffffffffu, p.a[i], 1);
    } else {
        __syncwarp();
    }
    p.b[i] = arena()[i ^ 1];  // lanes
}

// __syncwarp orders the lanes of its own warp alone.
GK_CASE(warps) {
    unsigned i = threadIdx.x;
    arena()[i] = p.a[i];  // warp wrote
    if (p.broken) {
        __syncwarp();
    } else {
        __syncthreads();
    }
    p.b[i] = arena()[i % 32];  // warps
}

// Half of a warp synchronises, and the other half reads.
GK_CASE(half_warp) {
    unsigned i = threadIdx.x;
    if (i < 16) {
        arena()[i] = p.a[i];  // half wrote
        __syncwarp(0xffffu);
        p.b[i] = arena()[i ^ 1];
    }
    if (!p.broken) __syncwarp();
    if (i >= 16) p.b[i] = arena()[i - 16];  // half_warp
}

// c (1,) float, updated in place by two CTAs
GK_CASE(ctas) {
    auto total = static_cast<float*>(p.c);
    if (threadIdx.x) return;
    if (p.broken) {
        *total += 1.0f;  // ctas
    } else {
        atomicAdd(total, 1.0f);
    }
}

// c (1,) float: atomics, and a plain read that nothing orders after them
GK_CASE(atomic_and_plain) {
    auto total = static_cast<float*>(p.c);
    if (threadIdx.x) atomicAdd(total, 1.0f);  // atomic
    __syncwarp();
    if (!p.broken) __syncthreads();
    if (threadIdx.x == 0) p.b[0] = *total;  // atomic_and_plain
}

// The same where the reader's own atomic is the last of two CTAs'.
GK_CASE(atomic_of_ctas) {
    auto total = static_cast<float*>(p.c);
    atomicAdd(total, 1.0f);  // last atomic
    if (p.broken && blockIdx.x) p.b[blockIdx.x] = *total;  // atomic_of_ctas
}

// Four warps: two write and arrive at barrier 1, two wait there and read.
GK_CASE(named_barrier) {
    using namespace gk::emulator;
    unsigned i = threadIdx.x;
    if (i < 64) {
        arena()[i] = p.a[i];
        barrier_arrive(1, 128);
        if (p.broken) arena()[i] = 0.0f;  // after arriving
    } else {
        barrier_sync(1, 128, "barrier_sync");
        p.b[i] = arena()[i - 64];  // named_barrier
    }
}

// Two barriers of two warps each order nothing between the pairs.
GK_CASE(wrong_barrier) {
    using namespace gk::emulator;
    unsigned i = threadIdx.x;
    arena()[i] = p.a[i];  // pair wrote
    barrier_sync(1 + i / 64, 64, "barrier_sync");
    p.b[i] = arena()[p.broken ? i % 64 : i ^ 32];  // wrong_barrier
}

void pair_barrier(unsigned number) {
    gk::emulator::barrier_sync(number, 64, "barrier");
}

// What warp 0 wrote reaches warp 2 by way of warp 1.
GK_CASE(chain) {
    unsigned i = threadIdx.x, warp = i / 32;
    if (warp == 0) arena()[i] = p.a[i];  // chain wrote
    if (warp < 2 && !p.broken) pair_barrier(1);
    if (warp == 1 || warp == 2) pair_barrier(2);
    p.b[i] = warp == 2 ? arena()[i % 32] : 0.0f;  // chain
}

// Warps 2 and 3 meet where warps 0 and 1 have met before, and learn nothing of them.
GK_CASE(reused_barrier) {
    unsigned i = threadIdx.x;
    arena()[i] = p.a[i];  // before reuse
    pair_barrier(1);
    p.b[i] = arena()[p.broken ? i % 32 : i ^ 32];  // reused_barrier
}

// c (1,) float: warps 0 and 1 read, and warp 0 waits for warp 2 alone before it writes.
GK_CASE(two_readers) {
    auto total = static_cast<float*>(p.c);
    unsigned warp = threadIdx.x / 32;
    float value = warp < 2 ? *total : 0.0f;  // second reader
    if (warp != 1) pair_barrier(1);
    if (!p.broken) __syncthreads();
    if (threadIdx.x == 0) *total = value + 1.0f;  // two_readers
    p.b[threadIdx.x] = value;
}

// c (1,) float: all warps read it, and all but the last wait for each other before one writes.
__global__ void readers(const __grid_constant__ Case p) {
    auto total = static_cast<float*>(p.c);
    const unsigned others = blockDim.x - 32;
    float value = *total;  // last reader
    if (threadIdx.x < others) gk::emulator::barrier_sync(1, others, "barrier");
    if (!p.broken) __syncthreads();
    if (threadIdx.x == 0) *total = value + 1.0f;  // readers
    p.b[threadIdx.x] = value;
}

// Of four warps, and of ten.
const NamedCase reader_cases[] = {
    {"three_readers", readers},
    {"ten_readers", readers},
};

// Of one warp the upper lanes read after a meeting of their own, and lane 0 waits for the lower.
GK_CASE(later_readers) {
    auto total = static_cast<float*>(p.c);
    bool upper = threadIdx.x >= 16;
    if (upper) __syncwarp(0xffff0000u);
    float value = *total;  // later reader
    if (!upper) __syncwarp(0x0000ffffu);
    if (!p.broken) __syncthreads();
    if (threadIdx.x == 0) *total = value + 1.0f;  // later_readers
    p.b[threadIdx.x] = value;
}

// n floats of shared memory. The same of a line that is read whole, and written in part.
GK_CASE(readers_of_line) {
    unsigned warp = threadIdx.x / 32;
    if (threadIdx.x == 0) gk::st128(arena(), gk::ld128(p.a));
    __syncthreads();
    p.b[threadIdx.x] = gk::ld128(arena()).at[0];  // last reader of line
    if (warp < 3) gk::emulator::barrier_sync(1, 96, "barrier");
    if (!p.broken) __syncthreads();
    if (threadIdx.x == 0) arena()[3] = 0.0f;  // readers_of_line
}

}  // namespace
