// A tile of a matrix of 16-bit elements in shared memory, laid out as TMA writes it with a swizzle
// and as wgmma reads it.
//
// The tile is a row of panels, one after another in memory. A panel is as wide as the span of the
// swizzle: 64 columns, or as many as divide the tile's width: 32 or 16. A panel's rows of 128 (64,
// 32) bytes follow one another too. The 16-byte chunks are swizzled: bits 4-6 (4-5, 4) of an
// address, which number the chunk in its row, are XORed with its bits 7-9 (7-8, 7) (PTX ISA,
// "Shared Memory Matrix Layout" and "Swizzling Modes"). Eight rows make an atom of 1,024 (512, 256)
// bytes, which is aligned to its size.
//
// A descriptor (PTX ISA, "Matrix Descriptor Format") holds three numbers of bytes, each divided by
// 16: the start address in bits 0-13, the leading dimension's offset (LBO) in bits 16-29, and the
// stride dimension's offset (SBO) in bits 32-45. Bits 49-51 are the base offset, 0 since atoms are
// aligned; bits 62-63 are the swizzle: 1 for 128 bytes, 2 for 64, 3 for 32. Offsets (PTX ISA,
// "Leading Dimension Byte Offset", "Stride Dimension Byte Offset", "Canonical Layouts"; T = 8
// elements are 16 bytes, and a row has c chunks):
//     K-major    ((8, m), (T, 2k)) : ((cT, SBO), (1, T)). SBO leads from one group of 8 rows to the
//                next: an atom. LBO is not used and set to 1. The 16 values of k are 32 of a row's
//                bytes. So the next step starts 32 bytes later, and the address bits that the
//                swizzle reads do not change.
//     MN-major   ((T, c, m), (8, k)) : ((1, T, LBO), (cT, SBO)). An atom is a panel wide; LBO leads
//                to the next panel. SBO leads from 8 rows of k to the next 8: an atom. So the next
//                step, 16 values of k, starts two atoms later. These layouts exist for whole atoms
//                only, so N is a multiple of the panel's width: heads of 96 take panels of 32.
#pragma once

#include <cstdint>

#include "runtime/launch.h"

#ifdef GK_EMULATE
#include "emulator/mma/wgmma.h"
#endif

namespace gk {

// The width of the panels of a tile: the widest that divides it.
__host__ __device__ constexpr int swizzled_panel_cols(int cols) {
    return cols % 64 == 0 ? 64 : cols % 32 == 0 ? 32 : 16;
}

// kTileRows x kTileCols of T at `data`, aligned to an atom.
template <class T, int kTileRows, int kTileCols>
struct SwizzledTile {
    static_assert(sizeof(T) == 2, "bf16 or fp16");
    static_assert(kTileRows % 8 == 0, "panels begin with an atom, 8 rows");
    static_assert(kTileCols % 16 == 0, "whole panels");
    static constexpr int kRows = kTileRows, kCols = kTileCols;
    static constexpr int kPanelCols = swizzled_panel_cols(kCols);
    static constexpr int kPanels = kCols / kPanelCols;
    static constexpr int kRowBytes = 2 * kPanelCols;  // of a panel, the span of the swizzle
    static constexpr int kPanelBytes = kRows * kRowBytes;
    static constexpr int kBytes = kPanels * kPanelBytes;

    T* data;

    __device__ T* panel(int i) const { return data + i * kRows * kPanelCols; }

    __device__ T* at(int row, int col) const {
        const auto r = static_cast<unsigned>(row), c = static_cast<unsigned>(col);
        constexpr unsigned kChunks = kPanelCols / 8;
        const unsigned chunk = (c / 8 % kChunks) ^ (r / (8 / kChunks) % kChunks);
        return data + c / kPanelCols * (kRows * kPanelCols) + r * kPanelCols + chunk * 8 + c % 8;
    }

    // The descriptor of an operand whose M or N dimension is the tile's rows and whose k is its
    // columns, starting at (row, k). row: a multiple of 8; k: a multiple of 16.
    __device__ uint64_t k_major(int row, int k) const {
        return descriptor(k / kPanelCols * kPanelBytes + row * kRowBytes + k % kPanelCols * 2, 16);
    }

    // The descriptor of an operand whose k is the tile's rows and whose M or N dimension is its
    // columns, starting at (k, col). k: a multiple of 8; col: a multiple of kPanelCols.
    __device__ uint64_t mn_major(int k, int col) const {
        return descriptor(col / kPanelCols * kPanelBytes + k * kRowBytes, kPanelBytes);
    }

  private:
    // The sums of 16-byte units cannot overflow their 14 bits, since shared memory is smaller than
    // that. So a constant part of `offset` is one addition to a descriptor that a loop's steps
    // share.
    __device__ uint64_t descriptor(int offset, int leading) const {
#ifdef GK_EMULATE
        const unsigned start = emulator::shared_address(data);
#else
        const unsigned start = static_cast<unsigned>(__cvta_generic_to_shared(data));
#endif
        const unsigned low = ((start & 0x3ffff) >> 4) + (static_cast<unsigned>(offset) >> 4) +
                             (static_cast<unsigned>(leading) >> 4 << 16);
        constexpr unsigned kSwizzle = kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 3;
        constexpr unsigned kHigh = (8 * kRowBytes >> 4) | kSwizzle << 30;  // with SBO
        return static_cast<uint64_t>(kHigh) << 32 | low;
    }
};

}  // namespace gk
