#include "emulator/mma/descriptor.h"

#include <cstring>
#include <string>

#include "runtime/launch.h"
#include "emulator/fiber/grid.h"
#include "emulator/mma/wgmma.h"

namespace gk::emulator {
namespace {

// A GPU keeps the first kilobyte of a CTA's shared memory for itself, so the arena begins after it.
constexpr uint32_t kArenaStart = 1024;
constexpr uint32_t kAtomRows = 8;

uint32_t bits_of(uint64_t descriptor, unsigned first, unsigned count) {
    return uint32_t(descriptor >> first) & ((1u << count) - 1);
}

struct Descriptor {
    uint32_t start, leading, stride, span;  // bytes; the span of the swizzle is a row of an atom
};

Descriptor decode(const std::string& name, uint64_t bits, uint32_t size, bool mn_major) {
    const auto wrong = [&](const std::string& what) {
        fail("the descriptor of " + name + " " + what);
    };
    const uint64_t unused = bits_of(bits, 14, 2) | bits_of(bits, 30, 2) | bits_of(bits, 46, 3) |
                            bits_of(bits, 52, 10);
    if (unused != 0) wrong("has bits set that mean nothing");
    const uint32_t swizzle = bits_of(bits, 62, 2);
    if (swizzle == 0) wrong("names no swizzle, and all tiles have one");
    if (bits_of(bits, 49, 3) != 0) {
        wrong("has base offset " + std::to_string(bits_of(bits, 49, 3)) +
              ", and tiles are aligned to the swizzle's pattern, for which it is 0");
    }
    const Descriptor d{bits_of(bits, 0, 14) << 4, bits_of(bits, 16, 14) << 4,
                       bits_of(bits, 32, 14) << 4, 256u >> swizzle};
    const uint32_t past = d.start % (kAtomRows * d.span);
    if (past >= d.span) {
        wrong("starts " + std::to_string(past) + " bytes past a multiple of " +
              std::to_string(kAtomRows * d.span) + ", within the swizzle's pattern");
    }
    if (mn_major ? past != 0 : past % 32 != 0) {
        wrong("starts " + std::to_string(past) + " bytes into a row of " + std::to_string(d.span) +
              ", of which " +
              (mn_major ? "an MN-major operand takes all" : "a step of k takes 32 aligned bytes"));
    }
    if (mn_major && size * 2 % d.span != 0) {
        wrong("names atoms of " + std::to_string(d.span / 2) + " columns, and the operand has " +
              std::to_string(size) + ", no whole number of atoms");
    }
    return d;
}

Segment segment_at(const char* name, uint32_t address, uint32_t span) {
    // The hardware does this to every address: the bits that number the chunk, 4-6 for a span of
    // 128 bytes, are XORed with as many bits from bit 7 on.
    address ^= (address >> 7 & (span / 16 - 1)) << 4;
    const uint32_t offset = (address & ~31u) - kArenaStart;
    if (offset >= launched->shared_bytes || launched->shared_bytes - offset < 32) {
        const int64_t byte = int64_t(address & ~31u) - kArenaStart;
        fail(std::string("the descriptor of ") + name + " leads to byte " + std::to_string(byte) +
             " of shared memory, which has " + std::to_string(launched->shared_bytes));
    }
    return {offset, (address & 16) != 0};
}

float number(uint16_t bits, bool bf16) {
    if (bf16) return __uint_as_float(uint32_t(bits) << 16);
    // Exponent and mantissa go to a float's place, and the product corrects the exponent's bias:
    // subnormals come out right too. Infinities and NaN have the largest exponent in both formats.
    const float magnitude = __uint_as_float((bits & 0x7fffu) << 13) * 0x1p112f;
    uint32_t word = __float_as_uint(magnitude);
    if ((bits & 0x7c00) == 0x7c00) word |= 0x7f800000;
    return __uint_as_float(word | uint32_t(bits & 0x8000) << 16);
}

template <bool kBf16>
void transposed(float* to, size_t pitch, const std::vector<uint16_t>& bits) {
    for (size_t i = 0; i < bits.size() / 16; ++i) {
        for (size_t k = 0; k < 16; ++k) to[k * pitch + i] = number(bits[i * 16 + k], kBf16);
    }
}

template <bool kBf16>
void straight(float* to, const std::vector<uint16_t>& bits) {
    for (size_t i = 0; i < bits.size(); ++i) to[i] = number(bits[i], kBf16);
}

}  // namespace

unsigned shared_address(const void* shared) {
    const auto address = static_cast<const unsigned char*>(shared);
    return kArenaStart + unsigned(address - running->cta->shared);
}

std::vector<Segment> segments_of(const char* name, uint64_t descriptor, int size, bool mn_major) {
    const Descriptor d = decode(name, descriptor, uint32_t(size), mn_major);
    const auto at = [&](uint32_t group, uint32_t row, uint32_t bytes) {
        return segment_at(name, d.start + group + row / kAtomRows * d.stride +
                                    row % kAtomRows * d.span + bytes, d.span);
    };
    std::vector<Segment> segments;
    segments.reserve(size_t(size));
    if (!mn_major) {
        for (uint32_t row = 0; row < uint32_t(size); ++row) segments.push_back(at(0, row, 0));
        return segments;
    }
    for (uint32_t k = 0; k < 16; ++k) {
        for (uint32_t column = 0; column < uint32_t(size); column += 16) {
            segments.push_back(at(2 * column / d.span * d.leading, k, 2 * column % d.span));
        }
    }
    return segments;
}

void copy_segments(std::vector<uint16_t>& to, const unsigned char* from,
                   const std::vector<Segment>& segments) {
    to.resize(segments.size() * 16);
    for (size_t i = 0; i < segments.size(); ++i) {
        const unsigned char* bytes = from + segments[i].offset;
        const size_t first = segments[i].exchanged ? 16 : 0;
        std::memcpy(&to[i * 16], bytes + first, 16);
        std::memcpy(&to[i * 16 + 8], bytes + (16 - first), 16);
    }
}

void to_rows(float* to, const std::vector<uint16_t>& bits, bool mn_major, bool bf16) {
    if (mn_major) {
        // bits[k][row]
        const size_t rows = bits.size() / 16;
        for (size_t k = 0; k < 16; ++k) {
            for (size_t row = 0; row < rows; ++row) {
                to[row * 16 + k] = number(bits[k * rows + row], bf16);
            }
        }
    } else {
        bf16 ? straight<true>(to, bits) : straight<false>(to, bits);
    }
}

void to_columns(float* to, const std::vector<uint16_t>& bits, bool mn_major, bool bf16) {
    if (mn_major) {
        bf16 ? straight<true>(to, bits) : straight<false>(to, bits);
    } else {
        const size_t columns = bits.size() / 16;
        bf16 ? transposed<true>(to, columns, bits) : transposed<false>(to, columns, bits);
    }
}

}  // namespace gk::emulator
