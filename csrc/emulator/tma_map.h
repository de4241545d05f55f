// What a tensor map holds in the emulator, in place of the driver's own encoding.
#pragma once

#include "../tensor_map.h"

namespace gk::emulator {

struct Map {
    uint64_t mark;      // kMapMark: other bytes are no map
    const char* base;
    int64_t size[5];
    int64_t stride[4];  // in bytes, of all dimensions but the innermost
    uint16_t box[5];
    uint8_t rank, element;  // how many bytes an element has
    DType dtype;
    Swizzle swizzle;
};

constexpr uint64_t kMapMark = 0x70616d726f736e74;

}  // namespace gk::emulator
