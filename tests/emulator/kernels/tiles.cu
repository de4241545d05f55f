// Tiles of shared memory and the fragments out of them (device/tile.h, device/copy.h), for
// tests/emulator/test_emulator.py: products of small matrices in every layout.
#include "cases.h"
#include "device/copy.h"

namespace {

constexpr int kSize = 32, kDepth = 48;

struct Where {
    int rows, cols, depth;  // that exist
    int a_start, a_stride;  // of A, in elements of the buffer
    int b_start, b_stride;
};

// D (32, 32) = A (32, 48) B (48, 32), and then round(D) (32, 32) times the first 32 rows of B.
// a, elements of T: A and B where c, a Where, says; n: bit 0 A is stored as (depth, rows), bit 1 B
// as (depth, cols) and else as (cols, depth), bit 2 both are aligned to 16 bytes; b fp32 (2, 32, 32)
// out. Two warps, 16 rows each.
template <class T>
__global__ void tile_product(const __grid_constant__ Case p) {
    using M = gk::Mma<T>;
    const auto& where = *static_cast<const Where*>(p.c);
    const bool a_transposed = p.n & 1, b_transposed = p.n & 2, aligned = p.n & 4;
    T* shared = reinterpret_cast<T*>(gk::shared_memory());
    const gk::SharedTile<T, kSize, kDepth> a{shared}, b{shared + kSize * kDepth};
    const gk::SharedTile<T, kDepth, kSize> a_t{shared}, b_t{shared + kSize * kDepth};

    const T* elements = reinterpret_cast<const T*>(p.a);
    const T *from_a = elements + where.a_start, *from_b = elements + where.b_start;
    if (a_transposed) {
        gk::copy_tile<64>(a_t, from_a, where.a_stride, where.depth, where.rows, aligned);
    } else {
        gk::copy_tile<64>(a, from_a, where.a_stride, where.rows, where.depth, aligned);
    }
    if (b_transposed) {
        gk::copy_tile<64>(b_t, from_b, where.b_stride, where.depth, where.cols, aligned);
    } else {
        gk::copy_tile<64>(b, from_b, where.b_stride, where.cols, where.depth, aligned);
    }
    gk::cp_async_commit();
    gk::cp_async_wait<0>();
    __syncthreads();

    const int row = int(threadIdx.x) / 32 * 16;
    float acc[2][kSize / 8][4] = {};
    for (int product = 0; product < 2; ++product) {
        for (int k = 0; k < (product == 0 ? kDepth : kSize); k += M::K) {
            typename M::A left;
            if (product == 1) {
                left = M::from_accumulators(acc[0] + k / 8);
            } else if (a_transposed) {
                load_a_transposed(left, a_t, k, row);
            } else {
                load_a(left, a, row, k);
            }
            for (int n = 0; n < kSize; n += 16) {
                typename M::B right[2];
                if (b_transposed) {
                    load_b_transposed(right, b_t, k, n);
                } else {
                    load_b(right, b, n, k);
                }
                for (int i = 0; i < 2; ++i) {
                    M::multiply(acc[product][n / 8 + i], left, right[i]);
                }
            }
        }
        for (int n = 0; n < kSize / 8; ++n) {
            for (int i = 0; i < 4; ++i) {
                const int r = row + gk::lane_index() / 4 + i / 2 * 8;
                const int c = 8 * n + gk::lane_index() % 4 * 2 + i % 2;
                p.b[(product * kSize + r) * kSize + c] = acc[product][n][i];
            }
        }
    }
}

const NamedCase tile_cases[] = {
    {"tile_product_f32", tile_product<float>},
    {"tile_product_bf16", tile_product<__nv_bfloat16>},
    {"tile_product_f16", tile_product<__half>},
};

}  // namespace
