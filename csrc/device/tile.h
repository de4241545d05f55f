// A tile of a matrix in shared memory, and functions that load a warp's mma fragments from it.
//
// Chunks of 16 bytes are swizzled: chunk c of eight consecutive rows lies in eight different groups
// of four banks. ldmatrix reads such a column of chunks, so it has no bank conflict.
#pragma once

#include "device/mma.h"
#include "device/vector.h"

namespace gk {

// kRows x kCols elements of T, 16-byte aligned; a row is a multiple of 16 bytes.
template <class T, int kTileRows, int kTileCols>
struct SharedTile {
    static constexpr int kRows = kTileRows, kCols = kTileCols;
    static constexpr int kBytes = kRows * kCols * static_cast<int>(sizeof(T));
    static constexpr int kChunk = 16 / static_cast<int>(sizeof(T));  // elements of 16 bytes
    static constexpr unsigned kChunks = kCols / kChunk;              // of a row
    static_assert(kCols % kChunk == 0, "a row is whole chunks of 16 bytes");
    // The largest power of two, up to 8, that divides the number of chunks of a row. 8 / kSpan rows
    // lie in different banks anyway; only from one such set of rows to the next must chunks move.
    static constexpr unsigned kSpan = kChunks % 8 == 0   ? 8
                                      : kChunks % 4 == 0 ? 4
                                      : kChunks % 2 == 0 ? 2
                                                         : 1;

    // A row's chunks are moved by this: it is XORed with the lowest bits of their number.
    __host__ __device__ static constexpr unsigned swizzle(unsigned row) {
        return row / (8 / kSpan) % kSpan;
    }

    // Whether the chunks of one number in eight rows lie in eight different groups of banks.
    __host__ __device__ static constexpr bool conflict_free() {
        for (unsigned chunk = 0; chunk < kSpan; ++chunk) {
            unsigned groups = 0;
            for (unsigned row = 0; row < 8; ++row) {
                groups |= 1u << (row * kChunks + (chunk ^ swizzle(row))) % 8;
            }
            if (groups != 0xff) return false;
        }
        return true;
    }

    T* data;

    __device__ T* at(int row, int col) const {
        static_assert(conflict_free(), "ldmatrix would wait for its own banks");
        unsigned r = static_cast<unsigned>(row), c = static_cast<unsigned>(col);
        // Only the lowest bits of the chunk's number change. The bits above them stay a constant
        // offset in unrolled loops.
        unsigned low = (c / kChunk % kSpan) ^ swizzle(r);
        unsigned high = c / kChunk / kSpan * kSpan;
        return data + row * kCols + static_cast<int>(high * kChunk) +
               static_cast<int>(low * kChunk + c % kChunk);
    }

    // The same, `down` rows lower. down: a multiple of 8, so that the swizzle is that of `row`; if
    // it is constant, it costs no register and no addition.
    __device__ T* at(int down, int row, int col) const { return at(row, col) + down * kCols; }
};

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) & 31; }

// Eight neighbouring floats of a row.
template <int kRows, int kCols>
__device__ inline void load_8(float (&values)[8], const SharedTile<float, kRows, kCols>& tile,
                              int down, int row, int col) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        Pack<float, 4> four = ld128(tile.at(down, row, col + 4 * half));
#pragma unroll
        for (int i = 0; i < 4; ++i) values[4 * half + i] = four.at[i];
    }
}

// The rows and columns given to the loads below are multiples of 8. Layouts of fragments:
// device/mma.h.

// A[16 x K] = tile[row ..., k ...]
template <class T, int kRows, int kCols>
__device__ inline void load_a(typename Mma<T>::A& a, const SharedTile<T, kRows, kCols>& tile,
                              int row, int k) {
    int lane = lane_index();
    if constexpr (sizeof(T) == 2) {
        ldmatrix_x4(a.r, tile.at(row, lane % 16, k + lane / 16 * 8));
    } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            load_8(a.rows[i], tile, row + 8 * i, lane / 4, k);
        }
    }
}

// A[16 x K] = tile[k ..., row ...], transposed
template <class T, int kRows, int kCols>
__device__ inline void load_a_transposed(typename Mma<T>::A& a,
                                         const SharedTile<T, kRows, kCols>& tile, int k, int row) {
    int lane = lane_index();
    if constexpr (sizeof(T) == 2) {
        ldmatrix_x4_trans(a.r, tile.at(k, lane / 16 * 8 + lane % 8, row + lane / 8 % 2 * 8));
    } else {
#pragma unroll
        for (int step = 0; step < 8; ++step) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                a.rows[i][step] = *tile.at(k, step, row + lane / 4 + 8 * i);
            }
        }
    }
}

// Two neighbouring B[K x 8], from tile[n ..., k ...]
template <class T, int kRows, int kCols>
__device__ inline void load_b(typename Mma<T>::B (&b)[2], const SharedTile<T, kRows, kCols>& tile,
                              int n, int k) {
    int lane = lane_index();
    if constexpr (sizeof(T) == 2) {
        uint32_t r[4];
        ldmatrix_x4(r, tile.at(n, lane / 16 * 8 + lane % 8, k + lane / 8 % 2 * 8));
        b[0] = {{r[0], r[1]}};
        b[1] = {{r[2], r[3]}};
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            load_8(b[i / 2].cols[i % 2], tile, n + i / 2 * 8, lane % 4 * 2 + i % 2, k);
        }
    }
}

// Two neighbouring B[K x 8], from tile[k ..., n ...]
template <class T, int kRows, int kCols>
__device__ inline void load_b_transposed(typename Mma<T>::B (&b)[2],
                                         const SharedTile<T, kRows, kCols>& tile, int k, int n) {
    int lane = lane_index();
    if constexpr (sizeof(T) == 2) {
        uint32_t r[4];
        ldmatrix_x4_trans(r, tile.at(k, lane % 16, n + lane / 16 * 8));
        b[0] = {{r[0], r[1]}};
        b[1] = {{r[2], r[3]}};
    } else {
#pragma unroll
        for (int step = 0; step < 8; ++step) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float* pair = tile.at(k, step, n + 8 * i + lane % 4 * 2);
                b[i].cols[0][step] = pair[0];
                b[i].cols[1][step] = pair[1];
            }
        }
    }
}

}  // namespace gk
