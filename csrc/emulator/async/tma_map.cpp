#include "emulator/async/tma_map.h"

#include <algorithm>
#include <cstring>

#include "runtime/context.h"

namespace gk {
namespace {

thread_local int contexts = 0;  // of the calling thread

}  // namespace

Context::Context(int) { ++contexts; }
Context::~Context() { --contexts; }

TensorMap detail::encode(const TensorMapShape& shape) {
    if (contexts == 0)
        throw Error("the driver refused a tensor map with error 201: this thread has no context");
    emulator::Map map{};
    map.mark = emulator::kMapMark;
    map.base = static_cast<const char*>(shape.base);
    for (int i = 0; i < shape.rank; ++i) {
        map.size[i] = shape.size[i];
        map.box[i] = static_cast<uint16_t>(shape.box[i]);
        if (i > 0) map.stride[i - 1] = byte_stride(shape, i);
    }
    map.rank = static_cast<uint8_t>(shape.rank);
    map.element = static_cast<uint8_t>(bytes_of(shape.dtype));
    map.dtype = shape.dtype;
    map.swizzle = shape.swizzle;
    TensorMap opaque{};
    static_assert(sizeof(map) <= sizeof(opaque));
    std::memcpy(&opaque, &map, sizeof map);
    return opaque;
}

namespace emulator {

Box box_of(const Map& map, const int* at, size_t offset) {
    const size_t width = size_t(map.box[0]) * map.element;
    size_t count = 1;
    for (int i = 1; i < map.rank; ++i) count *= map.box[i];
    Box box{count * width, offset, map.swizzle, {}};
    box.rows.reserve(count);
    const int64_t left = std::max<int64_t>(at[0], 0);
    const int64_t right = std::min(int64_t{at[0]} + map.box[0], map.size[0]);
    int step[5] = {};  // of the row within the box
    for (size_t row = 0; row < count; ++row) {
        bool inside = left < right;
        const char* global = map.base + left * map.element;
        for (int i = 1; i < map.rank; ++i) {
            const int64_t index = int64_t{at[i]} + step[i];
            inside &= index >= 0 && index < map.size[i];
            if (inside) global += index * map.stride[i - 1];
        }
        if (inside) {
            box.rows.push_back({row * width, size_t(left - at[0]) * map.element,
                                size_t(right - at[0]) * map.element, const_cast<char*>(global)});
        }
        for (int i = 1; i < map.rank && ++step[i] == map.box[i]; ++i) step[i] = 0;
    }
    return box;
}

Box box_of(void* global, size_t bytes, size_t offset) {
    return {bytes, offset, Swizzle::none, {{0, 0, bytes, static_cast<char*>(global)}}};
}

std::vector<unsigned char> load_box(const Box& box) {
    std::vector<unsigned char> image(box.bytes);
    for (const Row& row : box.rows) {
        const char* from = row.global;
        each_part(box, row, [&](size_t offset, size_t bytes) {
            std::memcpy(&image[offset - box.offset], from, bytes);
            from += bytes;
        });
    }
    return image;
}

std::vector<unsigned char> gather_box(const Box& box, const unsigned char* shared) {
    std::vector<unsigned char> data;
    data.reserve(box.bytes);
    for (const Row& row : box.rows) {
        each_part(box, row, [&](size_t offset, size_t bytes) {
            data.insert(data.end(), shared + offset, shared + offset + bytes);
        });
    }
    return data;
}

}  // namespace emulator
}  // namespace gk
