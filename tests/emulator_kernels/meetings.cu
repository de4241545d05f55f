// Threads that do not meet: deadlocks, diverging collectives, wrong masks and counts.
#include "cases.h"
#include "device/mma.h"

namespace {

using gk::emulator::Site;

void barrier(unsigned number, unsigned threads, Site site = Site::here()) {
    gk::emulator::barrier_sync(number, threads, site, "barrier");
}

// Two warps: one waits for both at barrier 1, the other for all of the CTA.
__global__ void deadlock(const Case p) {
    if (p.broken && threadIdx.x < 32) {
        barrier(1, 64);  // deadlock: named
    } else {
        __syncthreads();  // deadlock: all
    }
}

// Half of a warp never comes, waiting elsewhere.
__global__ void missing_lanes(const Case p) {
    if (p.broken && threadIdx.x < 16) {
        __syncwarp(0x0000ffffu);
        __syncthreads();  // missing_lanes: low
    } else {
        __shfl_xor_sync(0xffffffffu, 1, 1);  // missing_lanes: high
        __syncthreads();
    }
}

// Lanes of one warp in different shuffles, all of which name the whole warp.
__global__ void divergent_shuffle(const Case p) {
    unsigned mask = p.broken ? 0xffffffffu : threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u;
    if (threadIdx.x < 16) {
        __shfl_xor_sync(mask, 1, 1);  // divergent_shuffle: low
    } else {
        __shfl_xor_sync(mask, 1, 1);  // divergent_shuffle: high
    }
}

__global__ void divergent_barrier(const Case p) {
    if (p.broken && threadIdx.x < 16) {
        __syncthreads();  // divergent_barrier: low
    } else {
        __syncthreads();  // divergent_barrier: high
    }
}

__global__ void wrong_mask(const Case p) {
    __shfl_down_sync(p.broken ? 0x7fffffffu : 0xffffffffu, 1, 1);  // wrong_mask
}

__global__ void wrong_width(const Case p) {
    __shfl_sync(0xffffffffu, 1, 0, p.broken ? 12 : 16);  // wrong_width
}

// Lanes that have returned cannot take part in a matrix product.
__global__ void returned_lanes(const Case p) {
    if (p.broken && threadIdx.x >= 30) return;
    float acc[4] = {};
    gk::Mma<__half>::multiply(acc, {}, {});  // returned_lanes
}

__global__ void wrong_barrier_number(const Case p) {
    barrier(p.broken ? 16 : 15, 32);  // wrong_barrier_number
}

__global__ void wrong_barrier_count(const Case p) {
    barrier(1, p.broken ? 40 : 64);  // wrong_barrier_count
}

__global__ void unequal_barrier_counts(const Case p) {
    barrier(1, p.broken && threadIdx.x >= 32 ? 96 : 64);  // unequal_barrier_counts
}

__global__ void nothing(const Case) {}

}  // namespace

const NamedCase kMeetingCases[] = {
    {"deadlock", deadlock},
    {"missing_lanes", missing_lanes},
    {"divergent_shuffle", divergent_shuffle},
    {"divergent_barrier", divergent_barrier},
    {"wrong_mask", wrong_mask},
    {"wrong_width", wrong_width},
    {"returned_lanes", returned_lanes},
    {"wrong_barrier_number", wrong_barrier_number},
    {"wrong_barrier_count", wrong_barrier_count},
    {"unequal_barrier_counts", unequal_barrier_counts},
    {"nothing", nothing},
    {nullptr, nullptr},
};
