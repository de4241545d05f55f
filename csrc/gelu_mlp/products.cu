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

#include "gelu_mlp/choice.h"
#include "gelu_mlp/epilogue.h"
#include "gelu_mlp/tile.h"

namespace gk {
namespace {

// What happens to the tile of D once it is in shared memory.
template <class T, class C, Layout kLayout>
struct Epilogue : TileOfD<C> {
    using TileOfD<C>::m, TileOfD<C>::n, TileOfD<C>::rows, TileOfD<C>::cols, TileOfD<C>::split;
    using TileOfD<C>::col, TileOfD<C>::first_row, TileOfD<C>::valid, TileOfD<C>::load;
    using TileOfD<C>::kRowStep;

    const ProductKernel& kernel;

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

    // Stores total = addend + D, in fp32.
    __device__ __forceinline__ void add() const {
        const Product& p = kernel.p;
        for (int row = first_row(); row < rows; row += kRowStep) {
            float d[8], before[8] = {};
            load(d, row);
            if (p.addend != nullptr) {
                unpack_floats(before, load_valid<8>(p.addend + place(row), valid(),
                                                    kernel.out_aligned));
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) d[i] += before[i];
            store(p.total, row, d);
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
                if (p.total != nullptr) {
                    add();
                } else if (p.h == nullptr) {
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
    Epilogue<T, C, kLayout>{multiply_tile<T, C, kLayout>(kernel), kernel}.run();
}

// ---- host

template <class T, class C, Layout kLayout>
void launch_tiles(ProductKernel& kernel, DType dtype, const ProductChoice& choice, Stream stream) {
    const Product& p = kernel.p;
    const int64_t ctas = divide_into_tiles<C>(kernel, dtype);
    const std::string shape = shape_of(p) + " " + name_of(dtype);
    constexpr const char* kNames[] = {"gelu_mlp product, forward", "gelu_mlp product, backward",
                                      "gelu_mlp product, weight gradient"};
    const char* kernel_name = kNames[static_cast<int>(kLayout)];
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
    kernel.out_aligned = true;
    for (const void* matrix :
         {p.h, static_cast<const void*>(p.addend), static_cast<const void*>(p.out),
          static_cast<const void*>(p.activation), static_cast<const void*>(p.total)}) {
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
