// Copies a tile of a matrix from global to shared memory, by all threads of a CTA. The copy is
// asynchronous if the matrix is aligned. A reader waits for the group that holds the copy, then at
// a barrier.
#pragma once

#include "device/cp_async.h"
#include "device/tile.h"

namespace gk {

// tile[r, c] = source[r * row_stride + c] where r < rows_valid and c < cols_valid, else 0. Nothing
// is read outside. `aligned`: source and row_stride are multiples of 16 bytes (the same for all
// threads).
template <int kThreads, class Tile, class T>
__device__ inline void copy_tile(Tile tile, const T* source, int64_t row_stride, int rows_valid,
                          int cols_valid, bool aligned) {
    // The threads cover kSpan chunks of a row and step down by a multiple of 8 rows. So a thread
    // adds to one pointer, and its offsets into the tile differ by constants. If the threads took
    // all chunks in row-major order, each chunk's address would need registers of its own.
    constexpr int kSpan = static_cast<int>(Tile::kSpan), kStep = kThreads / kSpan;
    static_assert(kStep % 8 == 0, "the swizzle repeats every 8 rows");
    const int thread = static_cast<int>(threadIdx.x), col0 = thread % kSpan * Tile::kChunk;
    const T* from = source + thread / kSpan * row_stride + col0;
    if (aligned) {
#pragma unroll
        for (int first = 0; first < Tile::kRows; first += kStep, from += kStep * row_stride) {
            const int row = first + thread / kSpan;
            if (Tile::kRows % kStep != 0 && row >= Tile::kRows) break;
#pragma unroll
            for (int col = 0; col < Tile::kCols; col += kSpan * Tile::kChunk) {
                const int left = min(cols_valid - col0 - col, Tile::kChunk);
                const int valid = row < rows_valid ? max(0, left) : 0;
                cp_async_16(tile.at(row, col0 + col), from + col,
                            valid * static_cast<int>(sizeof(T)));
            }
        }
        return;
    }
#pragma unroll 1
    for (int row = thread / kSpan; row < Tile::kRows; row += kStep, from += kStep * row_stride) {
#pragma unroll 1
        for (int col = 0; col < Tile::kCols; col += kSpan * Tile::kChunk) {
            const int valid = row < rows_valid ? cols_valid - col0 - col : 0;
            Pack<T, Tile::kChunk> chunk;
#pragma unroll
            for (int i = 0; i < Tile::kChunk; ++i)
                chunk.at[i] = i < valid ? from[col + i] : T(0.0f);
            st128_shared(tile.at(row, col0 + col), chunk);
        }
    }
}

}  // namespace gk
