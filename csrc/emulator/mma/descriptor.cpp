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
constexpr uint32_t kAtomBytes = 1024, kRowBytes = 128;

uint32_t bits_of(uint64_t descriptor, unsigned first, unsigned count) {
    return uint32_t(descriptor >> first) & ((1u << count) - 1);
}

struct Descriptor {
    uint32_t start, leading, stride;  // bytes
};

Descriptor decode(const std::string& name, uint64_t bits, bool mn_major) {
    const auto wrong = [&](const std::string& what) {
        fail("the descriptor of " + name + " " + what);
    };
    const uint64_t unused = bits_of(bits, 14, 2) | bits_of(bits, 30, 2) | bits_of(bits, 46, 3) |
                            bits_of(bits, 52, 10);
    if (unused != 0) wrong("has bits set that mean nothing");
    if (bits_of(bits, 62, 2) != 1) {
        wrong("names swizzle " + std::to_string(bits_of(bits, 62, 2)) +
              ", and tiles have that of 128 bytes, 1");
    }
    if (bits_of(bits, 49, 3) != 0) {
        wrong("has base offset " + std::to_string(bits_of(bits, 49, 3)) +
              ", and tiles are aligned to 1,024 bytes, for which it is 0");
    }
    const Descriptor d{bits_of(bits, 0, 14) << 4, bits_of(bits, 16, 14) << 4,
                       bits_of(bits, 32, 14) << 4};
    const uint32_t past = d.start % kAtomBytes;
    if (past >= kRowBytes) {
        wrong("starts " + std::to_string(past) +
              " bytes past a multiple of 1,024, within the swizzle's pattern");
    }
    if (mn_major ? past != 0 : past % 32 != 0) {
        wrong("starts " + std::to_string(past) + " bytes into a row of 128, of which " +
              (mn_major ? "an MN-major operand takes all" : "a step of k takes 32 aligned bytes"));
    }
    return d;
}

Segment segment_at(const char* name, uint32_t address) {
    // The hardware does this to every address: bits 4-6 are XORed with bits 7-9.
    address ^= (address >> 7 & 7) << 4;
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
    const Descriptor d = decode(name, descriptor, mn_major);
    std::vector<Segment> segments;
    segments.reserve(size_t(size));
    if (!mn_major) {
        for (uint32_t row = 0; row < uint32_t(size); ++row) {
            segments.push_back(
                segment_at(name, d.start + row / 8 * d.stride + row % 8 * kRowBytes));
        }
        return segments;
    }
    for (uint32_t k = 0; k < 16; ++k) {
        for (uint32_t column = 0; column < uint32_t(size); column += 16) {
            segments.push_back(segment_at(name, d.start + column / 64 * d.leading +
                                                    k / 8 * d.stride + k % 8 * kRowBytes +
                                                    column % 64 * 2));
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
