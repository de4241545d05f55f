#include "tma_map.h"

#include <cstring>

namespace gk {

TensorMap detail::encode(const TensorMapShape& shape) {
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

}  // namespace gk
