// wgmma and its descriptors (device/wgmma.h, device/swizzled.h), stmatrix: products in every form,
// and what is forgotten around them.
#include "../cases.h"
#include "device/mma.h"
#include "device/stmatrix.h"
#include "device/swizzled.h"
#include "device/tile.h"
#include "device/tma.h"
#include "device/vector.h"
#include "device/warpgroup.h"
#include "device/wgmma.h"

namespace {

using gk::Major;
using Bf16 = __nv_bfloat16;

constexpr int kDepth = 128;

// Row-major `source` into the tile, by all 128 threads of the first warpgroup.
template <class T, int kRows, int kCols>
__device__ void fill(const gk::SwizzledTile<T, kRows, kCols>& tile, const T* source) {
    for (int i = int(threadIdx.x) * 8; i < kRows * kCols; i += 128 * 8) {
        gk::st128_shared(tile.at(i / kCols, i % kCols), gk::ld128(source + i));  // fill operand
    }
}

__device__ void publish() {
    gk::fence_proxy_async();
    __syncthreads();
}

// An accumulator's place in D (64, N).
__device__ int row_of(int i) {
    return int(threadIdx.x) / 32 % 4 * 16 + gk::lane_index() / 4 + i / 2 * 8;
}
__device__ int column_of(int tile, int i) { return 8 * tile + gk::lane_index() % 4 * 2 + i % 2; }

template <int N>
__device__ void write_out(float* to, const float (&acc)[N / 8][4]) {
    for (int tile = 0; tile < N / 8; ++tile) {
        for (int i = 0; i < 4; ++i) {
            to[row_of(i) * N + column_of(tile, i)] = acc[tile][i];  // write_out
        }
    }
}

// The descriptor of an operand, A or B, at k.
template <class T, int kRows, Major kMajor>
__device__ uint64_t operand(T* data, int k) {
    if constexpr (kMajor == Major::k) {
        return gk::SwizzledTile<T, kRows, kDepth>{data}.k_major(0, k);
    } else {
        return gk::SwizzledTile<T, kDepth, kRows>{data}.mn_major(k, 0);
    }
}

// D (+)= A B over kDepth; a(k) is A at k, a descriptor or registers.
template <class T, int N, Major kA, Major kB, class A>
__device__ void multiply(float (&acc)[N / 8][4], A a, T* b, bool accumulate) {
    gk::wgmma_fence_registers(acc);
    gk::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
        gk::Wgmma<T, N, kA, kB>::multiply(acc, a(k), operand<T, N, kB>(b, k), accumulate || k > 0);
    }
    gk::wgmma_commit();
    gk::wgmma_wait<0>();
    gk::wgmma_fence_registers(acc);
}

enum Form { kAccumulate = 1, kTransposedA = 2, kTransposedB = 4, kFromRegisters = 8 };

// b (64, N) out: A B, added to c (64, N) where p.n says kAccumulate. a, elements of T: A (64, 128)
// or with kTransposedA (128, 64), then B, (N, 128) or with kTransposedB (128, N). 128 threads.
template <class T, int N>
__global__ void wgmma_product(const __grid_constant__ Case p) {
    T* a = reinterpret_cast<T*>(gk::shared_memory());
    T* b = a + 64 * kDepth;
    const T* source = reinterpret_cast<const T*>(p.a);
    const bool accumulate = p.n & kAccumulate;
    if (p.n & kTransposedA) {
        fill(gk::SwizzledTile<T, kDepth, 64>{a}, source);
    } else {
        fill(gk::SwizzledTile<T, 64, kDepth>{a}, source);
    }
    source += 64 * kDepth;
    if (p.n & kTransposedB) {
        fill(gk::SwizzledTile<T, kDepth, N>{b}, source);
    } else {
        fill(gk::SwizzledTile<T, N, kDepth>{b}, source);
    }
    publish();

    float acc[N / 8][4];
    const float* start = static_cast<const float*>(p.c);
    for (int tile = 0; accumulate && tile < N / 8; ++tile) {
        for (int i = 0; i < 4; ++i) acc[tile][i] = start[row_of(i) * N + column_of(tile, i)];
    }
    typename gk::Mma<T>::A left[kDepth / 16];
    if (p.n & kFromRegisters) {
        const gk::SwizzledTile<T, 64, kDepth> tile{a};
        const int row = int(threadIdx.x) / 32 * 16 + gk::lane_index() % 16;
#pragma unroll
        for (int k = 0; k < kDepth; k += 16) {
            gk::ldmatrix_x4(left[k / 16].r, tile.at(row, k + gk::lane_index() / 16 * 8));
        }
    }
    const auto k_major = [&](int k) { return operand<T, 64, Major::k>(a, k); };
    const auto mn_major = [&](int k) { return operand<T, 64, Major::mn>(a, k); };
    const auto registers = [&](int k) -> const auto& { return left[k / 16].r; };
    switch (p.n & ~kAccumulate) {
        case 0: multiply<T, N, Major::k, Major::k>(acc, k_major, b, accumulate); break;
        case kTransposedA: multiply<T, N, Major::mn, Major::k>(acc, mn_major, b, accumulate); break;
        case kTransposedB: multiply<T, N, Major::k, Major::mn>(acc, k_major, b, accumulate); break;
        case kTransposedA | kTransposedB:
            multiply<T, N, Major::mn, Major::mn>(acc, mn_major, b, accumulate);
            break;
        case kFromRegisters: multiply<T, N, Major::k, Major::k>(acc, registers, b, accumulate); break;
        case kFromRegisters | kTransposedB:
            multiply<T, N, Major::k, Major::mn>(acc, registers, b, accumulate);
            break;
    }
    write_out<N>(p.b, acc);
}

// ---- Two steps of what kernels do, right or with one mistake: D (64, 64) = A B with A (64, 64)
// and B (64, 64), bf16, both K-major and one after the other in a; b out. 128 threads unless it
// says more.

using Tile = gk::SwizzledTile<Bf16, 64, 64>;
using Product = gk::Wgmma<Bf16, 64>;

__device__ Tile tile_a() { return {reinterpret_cast<Bf16*>(gk::shared_memory())}; }
__device__ Tile tile_b() { return {tile_a().data + Tile::kBytes / 2}; }

__device__ void fill_both(const Case& p) {
    fill(tile_a(), reinterpret_cast<const Bf16*>(p.a));             // fill A
    fill(tile_b(), reinterpret_cast<const Bf16*>(p.a) + 64 * 64);  // fill B
}

__device__ void share_both(const Case& p) {
    fill_both(p);
    publish();
}

__device__ void issue(float (&acc)[8][4], int first, int end) {
#pragma unroll
    for (int k = first; k < end; k += 16) {
        Product::multiply(acc, tile_a().k_major(0, k), tile_b().k_major(0, k), k > 0);  // issue
    }
}

// A part of the product, the whole by default, as one group.
__device__ void issue_group(float (&acc)[8][4], int first = 0, int end = 64) {
    issue(acc, first, end);  // group
    gk::wgmma_commit();
}

__device__ void finish(float (&acc)[8][4], float* to) {
    gk::wgmma_wait<0>();  // wait for products
    gk::wgmma_fence_registers(acc);
    write_out<64>(to, acc);  // finish
}

GK_CASE(product_without_wait) {
    share_both(p);
    float acc[8][4];
    gk::wgmma_fence();
    issue_group(acc);
    if (!p.broken) gk::wgmma_wait<0>();
    gk::wgmma_fence_registers(acc);
    write_out<64>(p.b, acc);  // product_without_wait
    gk::wgmma_wait<0>();
}

// What no commit has closed is not waited for.
GK_CASE(product_without_commit) {
    share_both(p);
    float acc[8][4];
    gk::wgmma_fence();
    issue(acc, 0, 64);
    if (!p.broken) gk::wgmma_commit();
    finish(acc, p.b);  // product_without_commit
}

GK_CASE(product_wait_short_by_one) {
    share_both(p);
    float acc[8][4], other[8][4];
    gk::wgmma_fence();
    issue_group(other, 0, 16);
    issue_group(acc);
    gk::wgmma_wait<1>();
    gk::wgmma_fence_registers(other);
    if (!p.broken) gk::wgmma_wait<0>();
    gk::wgmma_fence_registers(acc);
    write_out<64>(p.b, acc);  // product_wait_short_by_one
    gk::wgmma_wait<0>();
}

// Two groups on the same accumulators, of which one is waited for.
GK_CASE(product_half_waited_for) {
    share_both(p);
    float acc[8][4];
    gk::wgmma_fence();
    issue_group(acc, 0, 32);
    issue_group(acc, 32, 64);
    gk::wgmma_wait<1>();
    if (!p.broken) gk::wgmma_wait<0>();
    gk::wgmma_fence_registers(acc);
    write_out<64>(p.b, acc);  // product_half_waited_for
    gk::wgmma_wait<0>();
}

GK_CASE(product_without_fence) {
    share_both(p);
    float acc[8][4];
    if (!p.broken) gk::wgmma_fence();
    issue_group(acc);  // product_without_fence
    finish(acc, p.b);
}

// A sum begins again before the one before it has been waited for.
GK_CASE(product_started_anew) {
    share_both(p);
    float acc[8][4];
    gk::wgmma_fence();
    issue(acc, 0, 48);
    issue_group(acc);
    finish(acc, p.b);
}

// Twice half of the product's first half, then its second.
GK_CASE(product_rescaled) {
    share_both(p);
    float acc[8][4];
    gk::wgmma_fence();
    issue_group(acc, 0, 32);
    gk::wgmma_wait<0>();
    gk::wgmma_fence_registers(acc);
    for (int tile = 0; tile < 8; ++tile) {
        for (int i = 0; i < 4; ++i) acc[tile][i] *= 2.0f;
    }
    if (!p.broken) gk::wgmma_fence();
    issue_group(acc, 32, 64);  // product_rescaled
    finish(acc, p.b);
}

// The accumulators rounded are A of a second product: (A B) B.
GK_CASE(product_rounded) {
    share_both(p);
    float acc[8][4], sums[8][4];
    gk::wgmma_fence();
    issue_group(acc);
    gk::wgmma_wait<0>();
    gk::wgmma_fence_registers(acc);
    if (p.broken) gk::wgmma_fence();
    gk::Mma<Bf16>::A left[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) left[k] = gk::Mma<Bf16>::from_accumulators(acc + 2 * k);
    if (!p.broken) gk::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        Product::multiply(sums, left[k].r, tile_b().k_major(0, 16 * k), k > 0);  // product_rounded
    }
    gk::wgmma_commit();
    finish(sums, p.b);
}

// n: 1 for A, else B
__device__ Bf16* element_of(const Case& p) { return (p.n ? tile_a() : tile_b()).at(5, 20); }

GK_CASE(product_operand_overwritten) {
    share_both(p);
    float acc[8][4];
    gk::wgmma_fence();
    issue_group(acc);  // reads what is overwritten
    if (!p.broken) gk::wgmma_wait<0>();
    __syncthreads();
    if (threadIdx.x == 0) *element_of(p) = __float2bfloat16(100.0f);  // overwritten
    finish(acc, p.b);
}

// As a store that the emulator does not see.
__attribute__((noinline, no_sanitize("thread"))) __device__ void change(Bf16* at) {
    *at = __float2bfloat16(100.0f);
}

GK_CASE(product_operand_changed) {
    share_both(p);
    float acc[8][4];
    gk::wgmma_fence();
    issue_group(acc);
    if (!p.broken) gk::wgmma_wait<0>();
    __syncthreads();
    change(element_of(p));
    finish(acc, p.b);  // product_operand_changed
}

// As a store to an accumulator that the emulator does not see.
__attribute__((noinline, no_sanitize("thread"))) __device__ void change(float* at) { *at = 100.0f; }

GK_CASE(product_accumulator_changed) {
    share_both(p);
    float acc[8][4];
    gk::wgmma_fence();
    issue_group(acc);
    if (!p.broken) gk::wgmma_wait<0>();
    change(&acc[1][2]);
    finish(acc, p.b);  // product_accumulator_changed
}

// Not all threads come to the wait.
GK_CASE(product_not_waited_for_by_all) {
    share_both(p);
    float acc[8][4];
    gk::wgmma_fence();
    issue(acc, 0, 16);
    if (!p.broken || threadIdx.x != 77) issue(acc, 16, 64);  // all but one
    if (p.broken && threadIdx.x == 77) return;
    gk::wgmma_commit();
    finish(acc, p.b);  // product_not_waited_for_by_all
}

// The last warpgroup overwrites B when the others, which multiply, have given it back at a barrier.
// Broken: the last of these does so too early.
__global__ void product_given_back(const __grid_constant__ Case p) {
    const unsigned warpgroup = threadIdx.x / 128, last = blockDim.x / 128 - 1;
    if (warpgroup == 0) fill_both(p);
    publish();
    if (warpgroup == last) {
        gk::named_barrier_sync(1, blockDim.x);
        tile_b().data[threadIdx.x] = __float2bfloat16(100.0f);  // product_given_back
        return;
    }
    float acc[8][4];
    gk::wgmma_fence();
    issue_group(acc);  // reads what is given back
    const bool early = p.broken && warpgroup == last - 1;
    if (early) gk::named_barrier_arrive(1, blockDim.x);
    gk::wgmma_wait<0>();
    gk::wgmma_fence_registers(acc);
    if (!early) gk::named_barrier_arrive(1, blockDim.x);
    if (warpgroup == 0) write_out<64>(p.b, acc);
}

// 256 threads, and 384: alone, and beside a warpgroup that makes no mistake.
const NamedCase given_back_cases[] = {
    {"product_given_back_early", product_given_back},
    {"product_given_back_by_one", product_given_back},
};

GK_CASE(product_without_proxy_fence) {
    fill_both(p);  // without proxy fence
    if (!p.broken) gk::fence_proxy_async();
    __syncthreads();
    float acc[8][4];
    gk::wgmma_fence();
    issue_group(acc);  // product_without_proxy_fence
    finish(acc, p.b);
}

GK_CASE(product_without_barrier) {
    fill_both(p);  // without barrier of stores
    gk::fence_proxy_async();
    if (!p.broken) __syncthreads();
    float acc[8][4];
    gk::wgmma_fence();
    issue_group(acc);  // product_without_barrier
    finish(acc, p.b);
}

// Each warp multiplies rows of A that it wrote itself: no barrier of the warpgroup is needed.
GK_CASE(product_of_own_rows) {
    fill(tile_b(), reinterpret_cast<const Bf16*>(p.a) + 64 * 64);
    publish();
    const int warp = int(threadIdx.x) / 32;
    for (int i = gk::lane_index(); i < 16 * 8; i += 32) {
        const int row = 16 * (p.broken ? 3 - warp : warp) + i / 8, col = i % 8 * 8;
        gk::st128_shared(tile_a().at(row, col),
                         gk::ld128(reinterpret_cast<const Bf16*>(p.a) + row * 64 + col));
    }
    gk::fence_proxy_async();
    __syncwarp();
    float acc[8][4];
    gk::wgmma_fence();
    issue_group(acc);  // product_of_own_rows
    finish(acc, p.b);
}

// The same with A transposed, (depth, rows): a warp writes its 16 columns.
GK_CASE(product_of_own_columns) {
    fill(tile_b(), reinterpret_cast<const Bf16*>(p.a) + 64 * 64);
    publish();
    const int warp = int(threadIdx.x) / 32;
    for (int i = gk::lane_index(); i < 64 * 2; i += 32) {
        const int col = 16 * (p.broken ? 3 - warp : warp) + i % 2 * 8;
        gk::st128_shared(tile_a().at(i / 2, col),
                         gk::ld128(reinterpret_cast<const Bf16*>(p.a) + i / 2 * 64 + col));
    }
    gk::fence_proxy_async();
    __syncwarp();
    float acc[8][4];
    gk::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 64; k += 16) {
        const uint64_t a = tile_a().mn_major(k, 0), b = tile_b().k_major(0, k);
        gk::Wgmma<Bf16, 64, Major::mn>::multiply(acc, a, b, k > 0);  // product_of_own_columns
    }
    gk::wgmma_commit();
    finish(acc, p.b);
}

GK_CASE(product_diverges) {
    share_both(p);
    float acc[8][4];
    gk::wgmma_fence();
    if (p.broken && threadIdx.x < 64) {
        issue(acc, 0, 64);  // product_diverges: low
    } else {
        issue(acc, 0, 64);  // product_diverges: high
    }
    gk::wgmma_commit();
    finish(acc, p.b);
}

// Warps of one warpgroup name different columns of B, or with n = 1 of A, or start otherwise (n =
// 2).
GK_CASE(product_of_two_minds) {
    share_both(p);
    float acc[8][4];
    gk::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 64; k += 16) {
        const int other = p.broken && threadIdx.x >= 96;
        const uint64_t a = tile_a().k_major(0, other && p.n == 1 ? k ^ 16 : k);
        const uint64_t b = tile_b().k_major(0, other && p.n == 0 ? k ^ 16 : k);
        Product::multiply(acc, a, b, k > 0 || (other && p.n == 2));  // product_of_two_minds
    }
    gk::wgmma_commit();
    finish(acc, p.b);
}

#ifdef GK_EMULATE
// Warps go on with different accumulators: on a GPU these are registers, which no address chooses.
GK_CASE(product_of_two_sums) {
    share_both(p);
    float acc[8][4], spare[8][4];
    gk::wgmma_fence();
    issue(acc, 0, 32);
    auto& sums = p.broken && threadIdx.x >= 96 ? spare : acc;
    issue_group(sums, 32, 64);  // product_of_two_sums
    finish(acc, p.b);
}
#endif

// A product of another shape on accumulators in flight.
GK_CASE(product_of_two_shapes) {
    share_both(p);
    float acc[8][4];
    auto& half = reinterpret_cast<float(&)[4][4]>(acc);
    gk::wgmma_fence();
    issue(acc, 0, 48);
    if (!p.broken) {
        issue(acc, 48, 64);
    } else {
        const uint64_t a = tile_a().k_major(0, 48), b = tile_b().k_major(0, 48);
        gk::Wgmma<Bf16, 32>::multiply(half, a, b, true);  // product_of_two_shapes
    }
    gk::wgmma_commit();
    finish(acc, p.b);
}

// B (64, 64) as it lies, k by column. Broken: half an atom of its columns.
GK_CASE(product_of_half_an_atom) {
    share_both(p);
    float acc[8][4], half[4][4];
    gk::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 64; k += 16) {
        const uint64_t a = tile_a().k_major(0, k), b = tile_b().mn_major(k, 0);
        if (p.broken) {
            using Half = gk::Wgmma<Bf16, 32, Major::k, Major::mn>;
            Half::multiply(half, a, b, k > 0);  // product_of_half_an_atom
        } else {
            gk::Wgmma<Bf16, 64, Major::k, Major::mn>::multiply(acc, a, b, k > 0);
        }
    }
    gk::wgmma_commit();
    finish(acc, p.b);
}

// 96 threads
GK_CASE(product_of_three_warps) {
    float acc[8][4];
    if (p.broken) gk::wgmma_fence();  // product_of_three_warps
    if (p.broken) issue(acc, 0, 64);
}

// c int32 (2,): what is added to B's descriptor, low and high bits; n: whether B is MN-major.
GK_CASE(product_of_descriptor) {
    share_both(p);
    const auto* change = static_cast<const unsigned*>(p.c);
    const uint64_t bits = uint64_t(change[1]) << 32 | change[0];
    float acc[8][4];
    gk::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 64; k += 16) {
        const uint64_t b = (p.n ? tile_b().mn_major(k, 0) : tile_b().k_major(0, k)) + bits;
        const uint64_t a = tile_a().k_major(0, k);
        if (p.n) {
            gk::Wgmma<Bf16, 64, Major::k, Major::mn>::multiply(acc, a, b, k > 0);
        } else {
            Product::multiply(acc, a, b, k > 0);
        }
    }
    gk::wgmma_commit();
    finish(acc, p.b);
}

// a (64, 64) bf16 in; c (2, 64, 64) bf16 out: each warp takes its 16 rows as accumulators'
// fragments and stores them by stmatrix, straight and, a 16 x 16 block at a time, transposed. 128
// threads.
GK_CASE(stmatrix) {
    const auto* source = reinterpret_cast<const Bf16*>(p.a);
    const Tile tile{tile_a()}, turned{tile_b()};
    const int warp = int(threadIdx.x) / 32, lane = gk::lane_index();
    for (int col = 0; col < 64; col += 16) {
        uint32_t r[4];
        for (int i = 0; i < 4; ++i) {
            const int row = 16 * warp + lane / 4 + i % 2 * 8;
            memcpy(&r[i], source + row * 64 + col + i / 2 * 8 + lane % 4 * 2, sizeof r[i]);
        }
        gk::stmatrix_x4(tile.at(16 * warp + lane % 16, col + lane / 16 * 8), r);
        const int row = 16 * warp + lane / 16 * 8 + lane % 8;
        gk::stmatrix_x4_trans(turned.at(row, col + lane / 8 % 2 * 8), r);
    }
    __syncthreads();
    auto* out = static_cast<Bf16*>(p.c);
    for (int i = int(threadIdx.x) * 8; i < 64 * 64; i += 128 * 8) {
        gk::st128(out + i, gk::ld128(tile.at(i / 64, i % 64)));
        gk::st128(out + 64 * 64 + i, gk::ld128(turned.at(i / 64, i % 64)));
    }
}

#define GK_PRODUCTS(N)                          \
    {"wgmma_bf16_" #N, wgmma_product<Bf16, N>}, \
    {"wgmma_f16_" #N, wgmma_product<__half, N>}

const NamedCase product_cases[] = {
    GK_PRODUCTS(16),
    GK_PRODUCTS(32),
    GK_PRODUCTS(48),
    GK_PRODUCTS(64),
    GK_PRODUCTS(80),
    GK_PRODUCTS(96),
    GK_PRODUCTS(112),
    GK_PRODUCTS(128),
    GK_PRODUCTS(144),
    GK_PRODUCTS(160),
    GK_PRODUCTS(176),
    GK_PRODUCTS(192),
    GK_PRODUCTS(208),
    GK_PRODUCTS(224),
    GK_PRODUCTS(240),
    GK_PRODUCTS(256),
};

}  // namespace
