// The tiles of a matrix product for any GPU from compute capability 8.0 on: the sizes of a CTA's
// tile, and the loop that multiplies. gelu_mlp/products.cu finishes the tiles as the GELU MLP's
// products; linear_cross_entropy/products.cu as logits, which it never stores.
//
//     D (m, n) = A B, in the operand layouts of gelu_mlp/params.h, in fp32
//
// Each CTA reads the rows of A and the columns of B that its tile of D needs, once. The tile ends
// in shared memory, where a kernel's epilogue takes it from.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "device/copy.h"
#include "device/mma.h"
#include "device/tile.h"
#include "device/vector.h"
#include "gelu_mlp/params.h"

namespace gk {

// Row tiles that read the same columns of B run together, so that these columns stay in L2.
constexpr int kGroup = 8;

// The sizes of a kernel: a CTA's tile of D, m x n, in which its warps' tiles lie side by side; the
// depth of one step along k, 64 or 128 bytes; and the stages, each of which holds one step in
// flight or in use.
template <class T, int kTileM, int kTileN, int kDepthBytes, int kTileStages, int kWarpRows,
          int kWarpCols, int kResident>
struct Config {
    static constexpr int kM = kTileM, kN = kTileN, kStages = kTileStages;
    static constexpr int kK = kDepthBytes / static_cast<int>(sizeof(T));
    static constexpr int kThreads = 32 * kWarpRows * kWarpCols;
    static constexpr int kWarpM = kM / kWarpRows, kWarpN = kN / kWarpCols, kWarpsN = kWarpCols;
    static constexpr int kCtas = kResident;  // CTAs on a multiprocessor, as registers should allow
    static constexpr int kStageBytes = (kM + kN) * kDepthBytes;
    static constexpr int kSharedBytes = std::max(kStages * kStageBytes, kM * kN * 4);
    static_assert(kSharedBytes <= 99 * 1024, "what every device from sm_80 on has");
};

// Warps of 64 x 64 read 32 KB of shared memory for a step of 128 x 128 x 32. Warps of 64 x 32 would
// read 48 KB, which at 128 bytes a clock takes as long as the products.
template <class T>
struct Large : Config<T, 128, 128, 64, 4, 2, 2, 2> {};
// fp32 needs the smaller warps, since registers are short: a thread has 8 x 8 results and their
// operands.
template <>
struct Large<float> : Config<float, 128, 128, 64, 4, 2, 4, 1> {};
template <class T>
struct Small : Config<T, 64, 64, 128, 3, 2, 2, sizeof(T) == 4 ? 2 : 3> {};

struct ProductKernel {
    Product p;
    // The tiles of D; `group` row tiles run together. The numbers have 32 bits, as the grid's size
    // has: 64-bit divisions would take a good part of a small tile's time.
    unsigned tiles_m, tiles_n, group;
    int split_steps;                         // steps along k of one split
    bool a_aligned, b_aligned, out_aligned;  // whether base and rows are aligned to 16 bytes
};

// A CTA's operands, and the stages of shared memory that hold tiles of them.
template <class T, class C, Layout kLayout>
struct Operands {
    static constexpr bool kTransA = kLayout == Layout::weight;
    static constexpr bool kTransB = kLayout != Layout::forward;
    template <bool kTransposed, int kSize>
    using Tile = std::conditional_t<kTransposed, SharedTile<T, C::kK, kSize>,
                                    SharedTile<T, kSize, C::kK>>;
    using TileA = Tile<kTransA, C::kM>;
    using TileB = Tile<kTransB, C::kN>;

    const T* a;  // the tile's first row or column
    const T* b;
    int64_t a_stride, b_stride, k_end;
    int rows, cols;  // rows and columns of D within the tile, at most kM and kN
    bool a_aligned, b_aligned;

    __device__ static TileA tile_a(int slot) {
        return {reinterpret_cast<T*>(shared_memory() + slot * C::kStageBytes)};
    }

    __device__ static TileB tile_b(int slot) {
        return {reinterpret_cast<T*>(shared_memory() + slot * C::kStageBytes + TileA::kBytes)};
    }

    __device__ void copy(int64_t k, int slot) const {
        const int depth = static_cast<int>(min(k_end - k, static_cast<int64_t>(C::kK)));
        if constexpr (kTransA) {
            copy_tile<C::kThreads>(tile_a(slot), a + k * a_stride, a_stride, depth, rows,
                                   a_aligned);
        } else {
            copy_tile<C::kThreads>(tile_a(slot), a + k, a_stride, rows, depth, a_aligned);
        }
        if constexpr (kTransB) {
            copy_tile<C::kThreads>(tile_b(slot), b + k * b_stride, b_stride, depth, cols,
                                   b_aligned);
        } else {
            copy_tile<C::kThreads>(tile_b(slot), b + k, b_stride, cols, depth, b_aligned);
        }
    }
};

// A warp's part of D: accumulators of its 16 x 8 tiles.
template <class C>
struct Accumulators {
    float at[C::kWarpM / 16][C::kWarpN / 8][4];
};

// acc += A B over one stage.
template <class T, class C, Layout kLayout>
__device__ __forceinline__ void multiply_stage(Accumulators<C>& acc, int slot, int warp_m,
                                               int warp_n) {
    using Source = Operands<T, C, kLayout>;
    const auto tile_a = Source::tile_a(slot);
    const auto tile_b = Source::tile_b(slot);
    // The fp32 loop is not unrolled: the fragments of the next k would be loaded ahead into
    // registers that fp32 does not have.
    [[maybe_unused]] constexpr int kUnrolled = sizeof(T) == 4 ? 1 : C::kK / Mma<T>::K;
#pragma unroll kUnrolled
    for (int k = 0; k < C::kK; k += Mma<T>::K) {
        typename Mma<T>::A a[C::kWarpM / 16];
#pragma unroll
        for (int i = 0; i < C::kWarpM / 16; ++i) {
            if constexpr (Source::kTransA) {
                load_a_transposed(a[i], tile_a, k, warp_m + 16 * i);
            } else {
                load_a(a[i], tile_a, warp_m + 16 * i, k);
            }
        }
#pragma unroll
        for (int j = 0; j < C::kWarpN / 8; j += 2) {
            typename Mma<T>::B b[2];
            if constexpr (Source::kTransB) {
                load_b_transposed(b, tile_b, k, warp_n + 8 * j);
            } else {
                load_b(b, tile_b, warp_n + 8 * j, k);
            }
#pragma unroll
            for (int i = 0; i < C::kWarpM / 16; ++i) {
                Mma<T>::multiply(acc.at[i][j], a[i], b[0]);
                Mma<T>::multiply(acc.at[i][j + 1], a[i], b[1]);
            }
        }
    }
}

// The tile of D in shared memory, in fp32. Groups of 8 columns are swizzled, so that the 8 rows
// that a warp writes at once lie in different banks.
template <class C>
__device__ __forceinline__ float* staged(int row, int col) {
    return reinterpret_cast<float*>(shared_memory()) + row * C::kN +
           (((col / 8) ^ (row % 8)) * 8 + col % 8);
}

template <class C>
__device__ __forceinline__ void stage(const Accumulators<C>& acc, int warp_m, int warp_n) {
    const int row = warp_m + lane_index() / 4, col = warp_n + lane_index() % 4 * 2;
#pragma unroll
    for (int i = 0; i < C::kWarpM / 16; ++i) {
#pragma unroll
        for (int j = 0; j < C::kWarpN / 8; ++j) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float* pair = staged<C>(row + 16 * i + 8 * half, col + 8 * j);
                *reinterpret_cast<float2*>(pair) =
                    make_float2(acc.at[i][j][2 * half], acc.at[i][j][2 * half + 1]);
            }
        }
    }
}

// A CTA's tile of D. An epilogue gives each thread eight columns of every kRowStep-th row.
template <class C>
struct TileOfD {
    static constexpr int kGroups = C::kN / 8, kRowStep = C::kThreads / kGroups;

    int64_t m, n;    // its first row and column
    int rows, cols;  // rows and columns of D in it
    unsigned split;

    __device__ static int col() { return static_cast<int>(threadIdx.x) % kGroups * 8; }
    __device__ static int first_row() { return static_cast<int>(threadIdx.x) / kGroups; }
    __device__ int valid() const { return min(cols - col(), 8); }

    __device__ __forceinline__ static void load(float (&d)[8], int row) {
        unpack_floats(d, load_pack<8>(staged<C>(row, col())));
    }
};

// Computes this CTA's tile of D, and leaves it in shared memory for all threads.
template <class T, class C, Layout kLayout>
__device__ __forceinline__ TileOfD<C> multiply_tile(const ProductKernel& kernel) {
    using Source = Operands<T, C, kLayout>;
    const Product& p = kernel.p;

    // CTAs go down `group` row tiles, then on to the next columns. The splits of k come one after
    // another.
    const unsigned tiles = kernel.tiles_m * kernel.tiles_n;
    const unsigned split = blockIdx.x / tiles, tile = blockIdx.x % tiles;
    const unsigned first = tile / (kernel.group * kernel.tiles_n) * kernel.group;
    const unsigned height = min(kernel.tiles_m - first, kernel.group);
    const unsigned place = tile - first * kernel.tiles_n;
    const int64_t m = static_cast<int64_t>(first + place % height) * C::kM;
    const int64_t n = static_cast<int64_t>(place / height) * C::kN;

    const int64_t k = static_cast<int64_t>(split) * kernel.split_steps * C::kK;
    const int64_t steps_left = (p.k - k + C::kK - 1) / C::kK;
    const int steps = static_cast<int>(min(max(steps_left, static_cast<int64_t>(0)),
                                           static_cast<int64_t>(kernel.split_steps)));

    const T* a = static_cast<const T*>(p.a) + (Source::kTransA ? m : m * p.a_stride);
    const T* b = static_cast<const T*>(p.b) + (Source::kTransB ? n : n * p.b_stride);
    const Source source{a,
                        b,
                        p.a_stride,
                        p.b_stride,
                        p.k,
                        static_cast<int>(min(p.m - m, static_cast<int64_t>(C::kM))),
                        static_cast<int>(min(p.n - n, static_cast<int64_t>(C::kN))),
                        kernel.a_aligned,
                        kernel.b_aligned};
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int warp_m = warp / C::kWarpsN * C::kWarpM, warp_n = warp % C::kWarpsN * C::kWarpN;

    Accumulators<C> acc = {};
#pragma unroll
    for (int step = 0; step < C::kStages - 1; ++step) {
        if (step < steps) source.copy(k + step * C::kK, step);
        cp_async_commit();
    }
    int slot = 0, free_slot = C::kStages - 1;
    for (int step = 0; step < steps; ++step) {
        cp_async_wait<C::kStages - 2>();
        // All threads' copies of this step are there, and all threads are done with the step before
        // it, whose slot the next copy takes.
        __syncthreads();
        const int ahead = step + C::kStages - 1;
        if (ahead < steps) source.copy(k + static_cast<int64_t>(ahead) * C::kK, free_slot);
        cp_async_commit();
        multiply_stage<T, C, kLayout>(acc, slot, warp_m, warp_n);
        free_slot = slot;
        slot = slot + 1 == C::kStages ? 0 : slot + 1;
    }

    __syncthreads();  // the stages become the tile of D
    stage<C>(acc, warp_m, warp_n);
    __syncthreads();
    return {m, n, source.rows, source.cols, split};
}

// ---- host

// Sets what a kernel with the tiles of C needs to know of kernel.p, and returns how many CTAs
// compute it.
template <class C>
int64_t divide_into_tiles(ProductKernel& kernel, DType dtype) {
    const Product& p = kernel.p;
    const int64_t size = dtype == DType::f32 ? 4 : 2;
    const int64_t tiles_m = divide_up(p.m, C::kM), tiles_n = divide_up(p.n, C::kN);
    kernel.a_aligned = aligned_16(p.a, p.a_stride * size);
    kernel.b_aligned = aligned_16(p.b, p.b_stride * size);
    kernel.tiles_m = static_cast<unsigned>(tiles_m);
    kernel.tiles_n = static_cast<unsigned>(tiles_n);
    kernel.group = static_cast<unsigned>(std::min<int64_t>(tiles_m, kGroup));
    kernel.split_steps = static_cast<int>(divide_up(divide_up(p.k, C::kK), p.splits));
    return tiles_m * tiles_n * p.splits;
}

}  // namespace gk
