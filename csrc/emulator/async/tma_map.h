// What a tensor map holds in the emulator, in place of the driver's own encoding, and the box that
// one copy moves.
#pragma once

#include <vector>

#include "runtime/tensor_map.h"

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

// A row of a box: its bytes from `first` to `last` are in the tensor, from `global` on. None are if
// `first` and `last` are equal.
struct Row {
    size_t shared;  // from the box's start, before the swizzle
    size_t first, last;
    char* global;
};

struct Box {
    size_t bytes;   // of the box in shared memory
    size_t offset;  // of the box in shared memory
    Swizzle swizzle;
    std::vector<Row> rows;
};

// The box at `at`, which has a coordinate for each dimension of the map, at `offset` of shared
// memory.
Box box_of(const Map& map, const int* at, size_t offset);
// Contiguous bytes, as a box of one row.
Box box_of(void* global, size_t bytes, size_t offset);

// What lies in shared memory after the box was loaded: the tensor's bytes, swizzled, and zeros.
std::vector<unsigned char> load_box(const Box& box);
// The bytes of the rows that are in the tensor, one row after the other, taken from where a load
// would leave them; `shared` is the arena.
std::vector<unsigned char> gather_box(const Box& box, const unsigned char* shared);
// Calls f(offset, bytes) for the parts of shared memory that hold a row, in the row's order.
template <class F>
void each_part(const Box& box, const Row& row, F&& f);

constexpr size_t kChunk = 16;

// Bits 4-6 ^= bits 7-9, or only as many of these bits as the swizzle's span has.
constexpr size_t swizzled(Swizzle swizzle, size_t offset) {
    constexpr size_t kMasks[] = {0, 0x10, 0x30, 0x70};
    return offset ^ (offset >> 3 & kMasks[static_cast<int>(swizzle)]);
}

template <class F>
void each_part(const Box& box, const Row& row, F&& f) {
    if (box.swizzle == Swizzle::none) {
        if (row.first < row.last) f(box.offset + row.shared + row.first, row.last - row.first);
        return;
    }
    for (size_t at = row.first; at < row.last;) {
        const size_t next = at / kChunk * kChunk + kChunk, end = next < row.last ? next : row.last;
        f(swizzled(box.swizzle, box.offset + row.shared + at), end - at);
        at = end;
    }
}

}  // namespace gk::emulator
