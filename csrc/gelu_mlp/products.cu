// The GELU MLP's products:  y = gelu(x w1^T + b1) w2^T + b2  and its gradients.
//
//     x (M, C), w1 (F, C), b1 (F,), w2 (C, F), b2 (C,), y (M, C)
//     forward    h = x w1^T + b1, a = gelu(h), both (M, F);  y = a w2^T + b2
//     backward   da = dy w2, dh = da gelu'(h);  dw2 = dy^T a, dw1 = dh^T x, dx = dh w1
//                db1, db2: the column sums of dh and dy
//
// One kernel computes all six products, D (m, n) = A B, in three operand layouts. Its epilogues add
// the bias; write h and a (either may be left out); or write dh, a once more and, for db1, the
// column sums of dh in each row tile. Bytes beyond the products' own operands: h, written once and
// read once. Saved for the backward pass: x, w1, w2 and h, in x's dtype. The activation is computed
// from h as stored (rounded), so the activation that the backward pass rebuilds is, bit for bit,
// the one that the forward pass used.
//
// Accumulation is in fp32. There are no atomics: gelu_mlp/sums.cu adds up partial sums (over row
// tiles for db1, over the splits of k for dw1 and dw2) in a fixed order.
#include <algorithm>
#include <type_traits>

#include "device/copy.h"
#include "device/mma.h"
#include "device/tile.h"
#include "device/vector.h"
#include "gelu_mlp/choice.h"
#include "gelu_mlp/epilogue.h"

namespace gk {
namespace {

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

// What happens to the tile of D once it is in shared memory: each thread takes eight columns of
// every kRowStep-th row.
template <class T, class C, Layout kLayout>
struct Epilogue {
    static constexpr int kGroups = C::kN / 8, kRowStep = C::kThreads / kGroups;

    const ProductKernel& kernel;
    int64_t m, n;    // the first row and column of the tile
    int rows, cols;  // rows and columns of D in the tile
    unsigned split;

    __device__ static int col() { return static_cast<int>(threadIdx.x) % kGroups * 8; }
    __device__ static int first_row() { return static_cast<int>(threadIdx.x) / kGroups; }
    __device__ int valid() const { return min(cols - col(), 8); }
    __device__ int64_t place(int row) const { return (m + row) * kernel.p.n + n + col(); }

    // Stores eight values of a row to an output (m, n).
    template <class U>
    __device__ __forceinline__ void store(U* base, int row, const float (&values)[8]) const {
        store_valid<8>(base + place(row), pack_floats<U>(values), valid(), kernel.out_aligned);
    }

    __device__ __forceinline__ Pack<T, 8> load_h(int row) const {
        return load_valid<8>(static_cast<const T*>(kernel.p.h) + place(row), valid(),
                             kernel.out_aligned);
    }

    __device__ __forceinline__ static void load(float (&d)[8], int row) {
        unpack_floats(d, load_pack<8>(staged<C>(row, col())));
    }

    // Stores out = D + bias, and the gelu of the rounded out.
    template <bool kTanh>
    __device__ __forceinline__ void forward() const {
        const Product& p = kernel.p;
        float bias[8] = {};
        if (p.bias != nullptr) {
            const T* from = static_cast<const T*>(p.bias) + n + col();
            unpack_floats(bias, load_valid<8>(from, valid(), false));
        }
        for (int row = first_row(); row < rows; row += kRowStep) {
            float d[8];
            load(d, row);
#pragma unroll
            for (int i = 0; i < 8; ++i) d[i] += bias[i];
            if (p.out != nullptr) store(static_cast<T*>(p.out), row, d);
            if (p.activation != nullptr) {
                activate<kTanh>(d, pack_floats<T>(d));
                store(static_cast<T*>(p.activation), row, d);
            }
        }
    }

    // Stores dh = D gelu'(h) and gelu(h), and adds to `sums` this thread's column sums of dh.
    template <bool kTanh>
    __device__ __forceinline__ void backward(float (&sums)[8]) const {
        const Product& p = kernel.p;
        Pack<T, 8> next = load_h(first_row());
        for (int row = first_row(); row < rows; row += kRowStep) {
            float d[8], h[8];
            load(d, row);
            unpack_floats(h, next);
            // The next row of h is loaded while this row is computed.
            if (row + kRowStep < rows) next = load_h(row + kRowStep);
            differentiate<kTanh>(d, h);
#pragma unroll
            for (int i = 0; i < 8; ++i) sums[i] += d[i];
            store(static_cast<T*>(p.out), row, d);
            if (p.activation != nullptr) store(static_cast<T*>(p.activation), row, h);
        }
    }

    template <class U>
    __device__ __forceinline__ void plain(U* base) const {
        for (int row = first_row(); row < rows; row += kRowStep) {
            float d[8];
            load(d, row);
            store(base, row, d);
        }
    }

    __device__ __forceinline__ void run() const {
        const Product& p = kernel.p;
        const bool any = first_row() < rows && valid() > 0;
        if constexpr (kLayout == Layout::forward) {
            if (any) p.tanh ? forward<true>() : forward<false>();
        } else if constexpr (kLayout == Layout::backward) {
            float sums[8] = {};
            if (any) {
                if (p.h == nullptr) {
                    plain(static_cast<T*>(p.out));
                } else {
                    p.tanh ? backward<true>(sums) : backward<false>(sums);
                }
            }
            if (p.partial != nullptr) sum_columns(sums);
        } else if (any) {
            if (p.splits > 1) {
                plain(p.partial + split * p.m * p.n);
            } else {
                plain(static_cast<T*>(p.out));
            }
        }
    }

    // Adds up all threads' sums, in the order of their rows.
    __device__ __forceinline__ void sum_columns(const float (&sums)[8]) const {
        __syncthreads();  // all threads have read the tile
        float* scratch = reinterpret_cast<float*>(shared_memory());  // (kRowStep, kN)
#pragma unroll
        for (int i = 0; i < 8; ++i) scratch[first_row() * C::kN + col() + i] = sums[i];
        __syncthreads();
        for (int c = static_cast<int>(threadIdx.x); c < cols; c += C::kThreads) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < kRowStep; ++i) sum += scratch[i * C::kN + c];
            kernel.p.partial[m / C::kM * kernel.p.n + n + c] = sum;
        }
    }
};

template <class T, class C, Layout kLayout>
__global__ void __launch_bounds__(C::kThreads, C::kCtas)
    product_kernel(const __grid_constant__ ProductKernel kernel) {
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

    Epilogue<T, C, kLayout>{kernel, m, n, source.rows, source.cols, split}.run();
}

// ---- host

template <class T, class C, Layout kLayout>
void launch_tiles(ProductKernel& kernel, DType dtype, const ProductChoice& choice, Stream stream) {
    const Product& p = kernel.p;
    const int64_t tiles_m = divide_up(p.m, C::kM), tiles_n = divide_up(p.n, C::kN);
    const int64_t ctas = tiles_m * tiles_n * p.splits;
    const std::string shape = shape_of(p) + " " + name_of(dtype);
    constexpr const char* kNames[] = {"gelu_mlp product, forward", "gelu_mlp product, backward",
                                      "gelu_mlp product, weight gradient"};
    const char* kernel_name = kNames[static_cast<int>(kLayout)];
    kernel.tiles_m = static_cast<unsigned>(tiles_m);
    kernel.tiles_n = static_cast<unsigned>(tiles_n);
    kernel.group = static_cast<unsigned>(std::min<int64_t>(tiles_m, kGroup));
    kernel.split_steps = static_cast<int>(divide_up(divide_up(p.k, C::kK), p.splits));
    launch(product_kernel<T, C, kLayout>,
           {.name = kernel_name,
            .shape = shape,
            .grid = grid_of(kernel_name, shape, ctas),
            .threads = C::kThreads,
            .shared_bytes = C::kSharedBytes,
            .stream = stream,
            .clocks = choice.clocks},
           kernel);
}

template <class T, Layout kLayout>
void launch_layout(ProductKernel& kernel, DType dtype, const ProductChoice& choice,
                   Stream stream) {
    if (choice.tile_rows == Large<T>::kM)
        launch_tiles<T, Large<T>, kLayout>(kernel, dtype, choice, stream);
    else
        launch_tiles<T, Small<T>, kLayout>(kernel, dtype, choice, stream);
}

}  // namespace

// Tiles are large where there are enough of them to give every multiprocessor work. The products
// for the weights' gradients have a long k and few tiles: k is split where that fills the last wave
// of CTAs better.
ProductChoice choose_product_any(Layout layout, int64_t m, int64_t n, int64_t k, int device) {
    constexpr int kLeastDepth = 1024;  // of a split: enough steps to hide its start and its sum
    constexpr int kMostSplits = 4;     // each split writes and reads a whole result in fp32
    const int most = layout == Layout::weight
                         ? static_cast<int>(std::clamp<int64_t>(k / kLeastDepth, 1, kMostSplits))
                         : 1;
    const int64_t large_tiles = divide_up(m, 128) * divide_up(n, 128);
    const int64_t processors = multiprocessors(device);
    const bool large = large_tiles * most >= processors;
    const int64_t tiles = large ? large_tiles : divide_up(m, 64) * divide_up(n, 64);
    const int64_t resident = processors * (large ? 2 : 3);

    ProductChoice choice{kAnyGpu, large ? 128 : 64, 1, 0};
    double least = 0.0;
    for (int splits = 1; splits <= most; ++splits) {
        const double waves = static_cast<double>(divide_up(tiles * splits, resident)) / splits;
        const double cost = waves * (1.0 + splits / 16.0);
        if (splits == 1 || cost < least) {
            least = cost;
            choice.splits = splits;
        }
    }
    return choice;
}

void launch_product_any(DType dtype, Layout layout, const Product& p, const ProductChoice& choice,
                        Stream stream) {
    const int64_t size = dtype == DType::f32 ? 4 : 2;
    ProductKernel kernel{};
    kernel.p = p;
    kernel.a_aligned = aligned_16(p.a, p.a_stride * size);
    kernel.b_aligned = aligned_16(p.b, p.b_stride * size);
    kernel.out_aligned = true;
    for (const void* matrix : {p.h, static_cast<const void*>(p.out),
                               static_cast<const void*>(p.activation)}) {
        kernel.out_aligned &= aligned_16(matrix, p.n * size);
    }
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        switch (layout) {
            case Layout::forward:
                return launch_layout<T, Layout::forward>(kernel, dtype, choice, stream);
            case Layout::backward:
                return launch_layout<T, Layout::backward>(kernel, dtype, choice, stream);
            case Layout::weight:
                return launch_layout<T, Layout::weight>(kernel, dtype, choice, stream);
        }
    });
}

}  // namespace gk
