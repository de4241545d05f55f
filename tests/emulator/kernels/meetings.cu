// Threads that do not meet: deadlocks, diverging collectives, wrong masks and counts.
#include "cases.h"
#include "device/mma.h"

namespace {

void barrier(unsigned number, unsigned threads) {
    gk::emulator::barrier_sync(number, threads, "barrier");
}

// Two warps: one waits for both at barrier 1, the other for all of the CTA.
GK_CASE(deadlock) {
    if (p.broken && threadIdx.x < 32) {
        barrier(1, 64);  // deadlock: named
    } else {
        __syncthreads();  // deadlock: all
    }
}

// Half of a warp never comes, waiting elsewhere.
GK_CASE(missing_lanes) {
    if (p.broken && threadIdx.x < 16) {
        __syncwarp(0x0000ffffu);
        __syncthreads();  // missing_lanes: low
    } else {
        __shfl_xor_sync(0xffffffffu, 1, 1);  // missing_lanes: high
        __syncthreads();
    }
}

// Lanes of one warp in different shuffles, all of which name the whole warp.
GK_CASE(divergent_shuffle) {
    unsigned mask = p.broken ? 0xffffffffu : threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u;
    if (threadIdx.x < 16) {
        __shfl_xor_sync(mask, 1, 1);  // divergent_shuffle: low
    } else {
        __shfl_xor_sync(mask, 1, 1);  // divergent_shuffle: high
    }
}

GK_CASE(divergent_barrier) {
    if (p.broken && threadIdx.x < 16) {
        __syncthreads();  // divergent_barrier: low
    } else {
        __syncthreads();  // divergent_barrier: high
    }
}

GK_CASE(wrong_mask) {
    __shfl_down_sync(p.broken ? 0x7fffffffu : 0xffffffffu, 1, 1);  // wrong_mask
}

GK_CASE(wrong_width) {
    __shfl_sync(0xffffffffu, 1, 0, p.broken ? 12 : 16);  // wrong_width
}

// Lanes that have returned cannot take part in a matrix product.
GK_CASE(returned_lanes) {
    if (p.broken && threadIdx.x >= 30) return;
    float acc[4] = {};
    gk::Mma<__half>::multiply(acc, {}, {});  // returned_lanes
}

GK_CASE(wrong_barrier_number) {
    barrier(p.broken ? 16 : 15, 32);  // wrong_barrier_number
}

GK_CASE(wrong_barrier_count) {
    barrier(1, p.broken ? 40 : 64);  // wrong_barrier_count
}

GK_CASE(unequal_barrier_counts) {
    barrier(1, p.broken && threadIdx.x >= 32 ? 96 : 64);  // unequal_barrier_counts
}

// 128 floats of shared memory. Both halves of the warp load a matrix, each in its own place.
GK_CASE(divergent_load) {
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

GK_CASE(divergent_product) {
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
GK_CASE(half_warps) {
    if (p.broken ? threadIdx.x % 32 < 16 : threadIdx.x < 32) barrier(1, 32);  // half_warps
}

// A warp comes to a barrier where half of another one waits.
GK_CASE(half_of_another) {
    if (threadIdx.x >= 32 || (p.broken && threadIdx.x < 16)) {
        barrier(1, 32);  // half_of_another
    }
    __syncthreads();
}

// Lanes that have returned count as little.
GK_CASE(returned_before_barrier) {
    if (p.broken && threadIdx.x % 32 >= 16) return;
    __syncwarp();
    barrier(1, 64);  // returned_before_barrier
}

// One warp cannot stand for two.
GK_CASE(arrives_twice) {
    if (threadIdx.x < 32) gk::emulator::barrier_arrive(1, 64);
    if (p.broken && threadIdx.x < 32) gk::emulator::barrier_arrive(1, 64);  // arrives_twice
    if (!p.broken && threadIdx.x >= 32) barrier(1, 64);
}

GK_CASE(arrives_for_nobody) {
    gk::emulator::barrier_arrive(1, p.broken ? 0 : 32);  // arrives_for_nobody
}

GK_CASE(nothing) { (void)p; }

}  // namespace
