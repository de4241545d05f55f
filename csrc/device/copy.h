// A tile of a matrix from global to shared memory, by all threads of a CTA, asynchronously where the
// matrix's alignment allows it. The reader waits for the group that holds the copy, then at a barrier.
#pragma once

#include "device/cp_async.h"
#include "device/tile.h"

namespace gk {

// tile[r, c] = source[r * row_stride + c] where r < rows_valid and c < cols_valid, else 0. Nothing is
// read outside. `aligned`: source and row_stride are multiples of 16 bytes (the same for all threads).
template <int kThreads, class Tile, class T>
__device__ void copy_tile(Tile tile, const T* source, int64_t row_stride, int rows_valid,
                          int cols_valid, bool aligned) {
    constexpr int kChunks = static_cast<int>(Tile::kChunks), kAll = Tile::kRows * kChunks;
    int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int first = 0; first < kAll; first += kThreads) {
        int index = first + thread;
        if (kAll % kThreads != 0 && index >= kAll) {
            break;
        }
        int row = index / kChunks, col = index % kChunks * Tile::kChunk;
        int valid = row < rows_valid ? max(0, min(cols_valid - col, Tile::kChunk)) : 0;
        // Where nothing is valid no address past the matrix is formed.
        const T* from = valid > 0 ? source + row * row_stride + col : source;
        if (aligned) {
            cp_async_16(tile.at(row, col), from, valid * static_cast<int>(sizeof(T)));
        } else {
            Pack<T, Tile::kChunk> chunk;
#pragma unroll
            for (int i = 0; i < Tile::kChunk; ++i) chunk.at[i] = i < valid ? from[i] : T(0.0f);
            st128(tile.at(row, col), chunk);
        }
    }
}

}  // namespace gk
