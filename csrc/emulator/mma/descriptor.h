// Operands of wgmma in shared memory: what their descriptors name, as the hardware reads them, from
// the bits of addresses. Layouts: device/swizzled.h.
#pragma once

#include <cstdint>
#include <vector>

namespace gk::emulator {

// 16 elements, 32 bytes: of a row or column along k where it is K-major, else of a value of k along
// the rows or columns. The swizzle leaves them side by side, their halves perhaps exchanged.
struct Segment {
    uint32_t offset;  // in the CTA's shared memory
    bool exchanged;
};

// The `size` segments of an operand of 16 x `size` elements: by row or column where it is K-major,
// else by k and then by 16 rows or columns. Fails with `name`, "A" or "B", where the descriptor is
// none that the kernels' layouts have, or leads out of shared memory.
std::vector<Segment> segments_of(const char* name, uint64_t descriptor, int size, bool mn_major);

// The descriptor's bytes of the CTA's shared memory `from`.
void copy_segments(std::vector<uint16_t>& to, const unsigned char* from,
                   const std::vector<Segment>& segments);

// Elements as floats, by [row][16] and by [16][column].
void to_rows(float* to, const std::vector<uint16_t>& bits, bool mn_major, bool bf16);
void to_columns(float* to, const std::vector<uint16_t>& bits, bool mn_major, bool bf16);

}  // namespace gk::emulator
