// A tile of a matrix of 16-bit elements in shared memory, laid out as TMA writes it with the
// 128-byte swizzle and as wgmma reads it.
//
// The tile is a row of panels, each 64 columns wide, one after another in memory. A panel's rows of
// 128 bytes follow one another too. Within a row the 16-byte chunks are swizzled: bits 4-6 of an
// address, which number the chunk, are XORed with its bits 7-9, the row modulo 8 (PTX ISA, "Shared
// Memory Matrix Layout" and "Swizzling Modes"). Eight rows make an atom of 1,024 bytes, which is
// aligned to 1,024 bytes.
//
// A descriptor (PTX ISA, "Matrix Descriptor Format") holds three numbers of bytes, each divided by
// 16: the start address in bits 0-13, the leading dimension's offset (LBO) in bits 16-29, and the
// stride dimension's offset (SBO) in bits 32-45. Bits 49-51 are the base offset, 0 since atoms are
// aligned; bits 62-63 are the swizzle, 1 for 128 bytes. Offsets (PTX ISA, "Leading Dimension Byte
// Offset", "Stride Dimension Byte Offset", "Canonical Layouts"; T = 8 elements are 16 bytes):
//     K-major    ((8, m), (T, 2k)) : ((8T, SBO), (1, T)). SBO leads from one group of 8 rows to the
//                next: 1,024. LBO is not used and set to 1. The 16 values of k are 32 of a row's
//                128 bytes. So the next step starts 32 bytes later, and the address bits that the
//                swizzle reads do not change.
//     MN-major   ((T, 8, m), (8, k)) : ((1, T, LBO), (8T, SBO)). An atom is 64 columns wide; LBO
//                leads to the next 64, which is the next panel. SBO leads from 8 rows of k to the
//                next 8: 1,024. So the next step, 16 values of k, starts 2,048 bytes later. The ISA
//                describes these layouts for whole atoms, N a multiple of 64. With other widths,
//                such as heads of 96, the last panel is read in part. No rule forbids that;
//                tests/emulator/test_hopper.py checks it on a GPU.
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

    // The descriptor of an operand whose M or N dimension is the tile's rows and whose k is its
    // columns, starting at (row, k). row: a multiple of 8; k: a multiple of 16.
    __device__ uint64_t k_major(int row, int k) const {
        return descriptor(k / kPanelCols * kPanelBytes + row * 128 + k % kPanelCols * 2, 16);
    }

    // The descriptor of an operand whose k is the tile's rows and whose M or N dimension is its
    // columns, starting at (k, col). k: a multiple of 8; col: a multiple of 64.
    __device__ uint64_t mn_major(int k, int col) const {
        return descriptor(col / kPanelCols * kPanelBytes + k * 128, kPanelBytes);
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
        constexpr unsigned kHigh = (1024 >> 4) | 1u << 30;  // SBO, 128-byte swizzle
        return static_cast<uint64_t>(kHigh) << 32 | low;
    }
};

}  // namespace gk
