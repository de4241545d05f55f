// What each primitive gives, for tests/emulator/test_emulator.py to compare with cases worked by hand.
#include "cases.h"
#include "device/mma.h"

namespace {

// c int32 (8, 32) out: of lane + 100, up 3, down 3, xor 5, from lane 9, and each in segments of 8
GK_CASE(shuffles) {
    int lane = int(threadIdx.x), value = lane + 100;
    auto out = static_cast<int*>(p.c) + lane;
    const unsigned all = 0xffffffffu;
    out[0 * 32] = __shfl_up_sync(all, value, 3);
    out[1 * 32] = __shfl_down_sync(all, value, 3);
    out[2 * 32] = __shfl_xor_sync(all, value, 5);
    out[3 * 32] = __shfl_sync(all, value, 9);
    out[4 * 32] = __shfl_up_sync(all, value, 3, 8);
    out[5 * 32] = __shfl_down_sync(all, value, 3, 8);
    out[6 * 32] = __shfl_xor_sync(all, value, 12, 8);
    out[7 * 32] = __shfl_sync(all, value, 9, 8);
    // Of the second number five bits count.
    out[8 * 32] = __shfl_up_sync(all, value, 35u);
    out[9 * 32] = __shfl_down_sync(all, value, 0xffffffffu);
    out[10 * 32] = __shfl_xor_sync(all, value, 37);
    out[11 * 32] = __shfl_sync(all, value, -1);
}

// c int32 (6, 32) out; the upper half of the warp votes apart from the lower in the last two rows
GK_CASE(votes) {
    int lane = int(threadIdx.x);
    auto out = static_cast<int*>(p.c) + lane;
    const unsigned all = 0xffffffffu, half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    out[0 * 32] = int(__ballot_sync(all, lane % 3 == 0));
    out[1 * 32] = __any_sync(all, lane == 31);
    out[2 * 32] = __any_sync(all, lane == 32);
    out[3 * 32] = __all_sync(all, lane < 32);
    out[4 * 32] = __all_sync(half, lane < 31);
    out[5 * 32] = int(__ballot_sync(half, lane % 5 == 0));
}

// a (threads,) in, b (threads,) out, as many floats of shared memory: in each group of `size` threads
// a turns by one n times, between two meetings.
template <class Meet>
__device__ void turn(const Case& p, unsigned size, Meet meet) {
    unsigned i = threadIdx.x, first = i / size * size;
    float value = p.a[i];
    for (int turn = 0; turn < p.n; ++turn) {
        arena()[i] = value;
        meet();
        value = arena()[first + (i - first + 1) % size];
        meet();
    }
    p.b[i] = value;
}

GK_CASE(turns) {
    turn(p, 32, [] { __syncwarp(); });
}

GK_CASE(turns_of_cta) {
    turn(p, blockDim.x, [] { __syncthreads(); });
}

#ifdef GK_EMULATE
// Two pairs of warps turn apart from each other, at named barriers.
GK_CASE(turns_of_pairs) {
    turn(p, 64, [] { gk::emulator::barrier_sync(1 + threadIdx.x / 64, 64, "barrier"); });
}
#endif

// c (2,) float, updated in place by all threads of all CTAs: their number, and 2 + their sum; b
// (CTAs, threads) out: what each found
GK_CASE(atomics) {
    auto sums = static_cast<float*>(p.c);
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    p.b[i] = atomicAdd(sums, 1.0f);
    atomicAdd(sums + 1, float(i));
}

// c int32 (CTAs, threads, 4) out: the built-in indices
GK_CASE(indices) {
    uint3 block = blockIdx;
    dim3 grid = gridDim;
    unsigned cta = (block.z * grid.y + block.y) * grid.x + block.x;
    auto out = static_cast<int*>(p.c) + 4 * (cta * blockDim.x + threadIdx.x);
    out[0] = int(block.x);
    out[1] = int(block.y);
    out[2] = int(block.z);
    out[3] = int(threadIdx.x);
}

// c uint16 (32, 8) in, four matrices of 8 x 8; b uint32 (2, 4, 32) out: registers of ldmatrix and
// of its transposing kind; 512 bytes of shared memory
GK_CASE(ldmatrix) {
    auto shared = reinterpret_cast<uint16_t*>(gk::shared_memory());
    unsigned lane = threadIdx.x;
    for (unsigned i = 0; i < 8; ++i) {
        shared[8 * lane + i] = static_cast<const uint16_t*>(p.c)[8 * lane + i];
    }
    __syncwarp();
    uint32_t r[4];
    gk::ldmatrix_x4(r, shared + 8 * lane);
    auto out = reinterpret_cast<uint32_t*>(p.b) + lane;
    for (int i = 0; i < 4; ++i) out[32 * i] = r[i];
    gk::ldmatrix_x4_trans(r, shared + 8 * lane);
    for (int i = 0; i < 4; ++i) out[32 * (4 + i)] = r[i];
}

// a (16, 16) and then (16, 8), in T; b (16, 8) out: 1 + their product. Registers are filled as the
// PTX ISA's tables for mma.m16n8k16 have it.
template <class T>
__global__ void mma(const __grid_constant__ Case p) {
    auto a = reinterpret_cast<const uint16_t*>(p.a), b = a + 16 * 16;
    int group = int(threadIdx.x) / 4, within = int(threadIdx.x) % 4;
    uint32_t fragment_a[4], fragment_b[2];
    for (int i = 0; i < 8; ++i) {
        int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
        int col = within * 2 + (i & 1) + (i >= 4 ? 8 : 0);
        uint32_t bits = a[row * 16 + col];
        fragment_a[i / 2] = i & 1 ? fragment_a[i / 2] | bits << 16 : bits;
    }
    for (int i = 0; i < 4; ++i) {
        int row = within * 2 + (i & 1) + (i >= 2 ? 8 : 0);
        uint32_t bits = b[row * 8 + group];
        fragment_b[i / 2] = i & 1 ? fragment_b[i / 2] | bits << 16 : bits;
    }
    float acc[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    gk::mma_m16n8k16(acc, fragment_a, fragment_b, T());
    for (int i = 0; i < 4; ++i) {
        int row = i < 2 ? group : group + 8, col = within * 2 + (i & 1);
        p.b[row * 8 + col] = acc[i];
    }
}

const NamedCase mma_cases[] = {
    {"mma_bf16", mma<__nv_bfloat16>},
    {"mma_f16", mma<__half>},
};

}  // namespace
