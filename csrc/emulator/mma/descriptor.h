// Operands of wgmma in shared memory: where their descriptors say that they lie, found as the
// hardware does from the bits of addresses. Layouts: device/swizzled.h.
#pragma once

#include <cstdint>
#include <vector>

namespace gk::emulator {

// 16 elements, 32 bytes. K-major: of one row or column, along k. MN-major: of one k, along the rows
// or columns. The swizzle leaves the elements side by side, perhaps with their halves exchanged.
struct Segment {
    uint32_t offset;  // in the CTA's shared memory
    bool exchanged;
};

// The `size` segments of an operand of 16 x `size` elements, ordered by row or column if it is
// K-major, else by k and then by 16 rows or columns. Fails with `name`, "A" or "B", if no layout of
// the kernels has such a descriptor, or if the descriptor leads out of shared memory.
std::vector<Segment> segments_of(const char* name, uint64_t descriptor, int size, bool mn_major);

// Copies the bytes of the segments out of the CTA's shared memory, `from`.
void copy_segments(std::vector<uint16_t>& to, const unsigned char* from,
                   const std::vector<Segment>& segments);

// Turns the elements into floats, ordered [row][16] or [16][column].
void to_rows(float* to, const std::vector<uint16_t>& bits, bool mn_major, bool bf16);
void to_columns(float* to, const std::vector<uint16_t>& bits, bool mn_major, bool bf16);

}  // namespace gk::emulator
