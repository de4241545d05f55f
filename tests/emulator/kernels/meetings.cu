// Threads that do not meet: deadlocks, diverging collectives, wrong masks and counts.
#include "cases.h"
#include "device/mma.h"

namespace {

void barrier(unsigned number, unsigned threads) {
    gk::emulator::barrier_sync(number, threads, "barrier");
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

// 128 floats of shared memory. Both halves of the warp load a matrix, each in its own place.
__global__ void divergent_load(const Case p) {
    unsigned lane = threadIdx.x;
    auto row = reinterpret_cast<float*>(gk::shared_memory()) + 4 * lane;
    gk::st128(row, gk::ld128(p.a + 4 * lane));
    uint32_t r[4];
    if (p.broken && lane < 16) {
        gk::ldmatrix_x4(r, row);  // divergent_load: low
    } else {
        gk::ldmatrix_x4(r, row);  // divergent_load: high
    }
    p.b[lane] = static_cast<float>(r[0]);
}

__global__ void divergent_product(const Case p) {
    float acc[4] = {};
    if (p.broken && threadIdx.x < 16) {
        gk::Mma<__half>::multiply(acc, {}, {});  // divergent_product: low
    } else {
        gk::Mma<__half>::multiply(acc, {}, {});  // divergent_product: high
    }
    p.b[threadIdx.x] = acc[0];
}

// Two warps, and a barrier for one. Half of each would make up the number, and a barrier counts
// whole warps.
__global__ void half_warps(const Case p) {
    if (p.broken ? threadIdx.x % 32 < 16 : threadIdx.x < 32) barrier(1, 32);  // half_warps
}

// A warp comes to a barrier where half of another one waits.
__global__ void half_of_another(const Case p) {
    if (threadIdx.x >= 32 || (p.broken && threadIdx.x < 16)) {
        barrier(1, 32);  // half_of_another
    }
    __syncthreads();
}

// Lanes that have returned count as little.
__global__ void returned_before_barrier(const Case p) {
    if (p.broken && threadIdx.x % 32 >= 16) return;
    __syncwarp();
    barrier(1, 64);  // returned_before_barrier
}

// One warp cannot stand for two.
__global__ void arrives_twice(const Case p) {
    if (threadIdx.x < 32) gk::emulator::barrier_arrive(1, 64);
    if (p.broken && threadIdx.x < 32) gk::emulator::barrier_arrive(1, 64);  // arrives_twice
    if (!p.broken && threadIdx.x >= 32) barrier(1, 64);
}

__global__ void arrives_for_nobody(const Case p) {
    gk::emulator::barrier_arrive(1, p.broken ? 0 : 32);  // arrives_for_nobody
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
    {"divergent_load", divergent_load},
    {"divergent_product", divergent_product},
    {"half_warps", half_warps},
    {"half_of_another", half_of_another},
    {"returned_before_barrier", returned_before_barrier},
    {"arrives_twice", arrives_twice},
    {"arrives_for_nobody", arrives_for_nobody},
    {"nothing", nothing},
    {nullptr, nullptr},
};
