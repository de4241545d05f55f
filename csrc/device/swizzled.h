// A tile of a matrix of 16-bit elements in shared memory, as TMA with the 128-byte swizzle leaves
// it and wgmma reads it.
//
// The tile is panels of 64 columns, one after another. A panel is its rows of 128 bytes, one after
// another, in which the 16-byte chunks are swizzled: bits 4-6 of an address, the chunk, are XORed
// with its bits 7-9, the row modulo 8 (PTX ISA, "Shared Memory Matrix Layout" and "Swizzling
// Modes"). Eight rows are an atom, 1,024 bytes, aligned to as many.
//
// A descriptor (PTX ISA, "Matrix Descriptor Format") holds, of bytes divided by 16: in bits 0-13
// the start address, 16-29 the leading dimension's offset (LBO), 32-45 the stride dimension's
// (SBO); in 49-51 the base offset, 0 since atoms are aligned; in 62-63 the swizzle, 1 for 128
// bytes. Offsets (PTX ISA, "Leading Dimension Byte Offset", "Stride Dimension Byte Offset",
// "Canonical Layouts"; T = 8 elements are 16 bytes):
//     K-major    ((8, m), (T, 2k)) : ((8T, SBO), (1, T)). SBO leads from one group of 8 rows to the
//                next: 1,024. LBO is not used, taken as 1. The 16 values of k are 32 of a row's 128
//                bytes: the next step starts 32 bytes on, and the address bits that the swizzle
//                reads stay as they are.
//     MN-major   ((T, 8, m), (8, k)) : ((1, T, LBO), (8T, SBO)). 64 columns are an atom's width,
//                LBO leads to the next 64: a panel. SBO leads from 8 rows of k to the next: 1,024,
//                so the next step, 16 values of k, starts 2,048 bytes on. The ISA writes these
//                layouts for whole atoms, N a multiple of 64. Of others, such as heads of 96, the
//                last panel is read in part: no rule forbids it, and tests/test_hopper.py asks a
//                GPU.
#pragma once

#include <cstdint>

#include "runtime/launch.h"

#ifdef GK_EMULATE
#include "emulator/mma/wgmma.h"
#endif

namespace gk {

// kTileRows x kTileCols of T at `data`, 1,024-byte aligned.
template <class T, int kTileRows, int kTileCols>
struct SwizzledTile {
    static_assert(sizeof(T) == 2, "bf16 or fp16");
    static_assert(kTileRows % 8 == 0, "panels begin with an atom, 8 rows");
    static constexpr int kRows = kTileRows, kCols = kTileCols;
    static constexpr int kPanelCols = 64;
    static constexpr int kPanels = (kCols + kPanelCols - 1) / kPanelCols;  // the last one whole
    static constexpr int kPanelBytes = kRows * 128;
    static constexpr int kBytes = kPanels * kPanelBytes;

    T* data;

    __device__ T* panel(int i) const { return data + i * kRows * kPanelCols; }

    __device__ T* at(int row, int col) const {
        const auto r = static_cast<unsigned>(row), c = static_cast<unsigned>(col);
        const unsigned chunk = (c / 8 % 8) ^ (r % 8);
        return data + c / kPanelCols * (kRows * kPanelCols) + r * kPanelCols + chunk * 8 + c % 8;
    }

    // Of an operand whose rows or columns, M or N, are the tile's rows and whose k are its columns,
    // from (row, k) on. row: a multiple of 8; k: of 16.
    __device__ uint64_t k_major(int row, int k) const {
        return descriptor(k / kPanelCols * kPanelBytes + row * 128 + k % kPanelCols * 2, 16);
    }

    // Of an operand whose k are the tile's rows and whose rows or columns, M or N, are its columns,
    // from (k, col) on. k: a multiple of 8; col: of 64.
    __device__ uint64_t mn_major(int k, int col) const {
        return descriptor(col / kPanelCols * kPanelBytes + k * 128, kPanelBytes);
    }

  private:
    // The two sums of 16-byte units cannot overflow their 14 bits: shared memory ends before. So
    // what is constant in `offset` is one addition to a descriptor that a loop's steps share.
    __device__ uint64_t descriptor(int offset, int leading) const {
#ifdef GK_EMULATE
        const unsigned start = emulator::shared_address(data);
#else
        const unsigned start = static_cast<unsigned>(__cvta_generic_to_shared(data));
#endif
        const unsigned low = ((start & 0x3ffff) >> 4) + (static_cast<unsigned>(offset) >> 4) +
                             (static_cast<unsigned>(leading) >> 4 << 16);
        constexpr unsigned kHigh = (1024 >> 4) | 1u << 30;  // SBO, 128-byte swizzle
        return static_cast<uint64_t>(kHigh) << 32 | low;
    }
};

}  // namespace gk
