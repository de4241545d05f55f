// Which tensors a map can describe, by the rules of cuTensorMapEncodeTiled (CUDA driver API,
// "Tensor Map Object Management"), and, on a GPU, the driver's encoding of the map.
#include "runtime/tensor_map.h"

#include <string>

#include "runtime/dry_run.h"

#ifndef GK_EMULATE
#include <cudaTypedefs.h>

#include "runtime/driver.h"
#endif

namespace gk {
namespace {

constexpr int kMostDimensions = 5, kWidestBox = 256, kAlignment = 16;
constexpr int64_t kLargestSize = int64_t{1} << 32, kStrideLimit = int64_t{1} << 40;

const char* dimension_refuses(const TensorMapShape& shape, int i) {
    if (shape.size[i] < 1) return "a dimension of the tensor is empty";
    if (shape.size[i] > kLargestSize) return "a dimension of the tensor is longer than 2^32";
    if (shape.box[i] < 1 || shape.box[i] > kWidestBox) {
        return "a box is 1 to 256 elements long in each dimension";
    }
    if (shape.size[i] == 1) return nullptr;
    if (i == 0) {
        return shape.stride[0] == 1 ? nullptr : "the innermost dimension has a stride other than 1";
    }
    // The stride in elements is checked first: in bytes it could overflow 64 bits.
    if (shape.stride[i] < 1 || shape.stride[i] >= kStrideLimit) {
        return "a stride is not between 0 and 2^40 bytes";
    }
    const int64_t stride = detail::byte_stride(shape, i);
    if (stride >= kStrideLimit) return "a stride is not between 0 and 2^40 bytes";
    if (stride % kAlignment != 0) return "a stride is not a multiple of 16 bytes";
    return nullptr;
}

}  // namespace

const char* tensor_map_refuses(const TensorMapShape& shape) {
    if (shape.rank < 1 || shape.rank > kMostDimensions) return "a tensor map has 1 to 5 dimensions";
    if (shape.base == nullptr) return "the tensor has no memory";
    if (reinterpret_cast<uintptr_t>(shape.base) % kAlignment != 0) {
        return "the tensor does not start at a multiple of 16 bytes";
    }
    for (int i = 0; i < shape.rank; ++i) {
        if (const char* reason = dimension_refuses(shape, i)) return reason;
    }
    const int row = shape.box[0] * detail::bytes_of(shape.dtype);
    if (row % kAlignment != 0) return "a row of the box is not a multiple of 16 bytes";
    if (shape.swizzle != Swizzle::none &&
        row != detail::kSwizzleSpans[static_cast<int>(shape.swizzle)]) {
        return "a row of the box is not as long as the span of its swizzle";
    }
    return nullptr;
}

TensorMap tensor_map(const TensorMapShape& shape) {
    if (const char* reason = tensor_map_refuses(shape)) {
        throw Error(std::string("there is no tensor map for this tensor: ") + reason);
    }
    if (DryRun::elsewhere() != nullptr) return {};
    return detail::encode(shape);
}

#ifndef GK_EMULATE

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap), "the driver's own type");
static_assert(alignof(TensorMap) >= alignof(CUtensorMap), "the driver's own type");

namespace {

CUtensorMapDataType driver_type(DType dtype) {
    switch (dtype) {
        case DType::bf16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
        case DType::f16: return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
        case DType::f32: break;
    }
    return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
}

CUtensorMapSwizzle driver_swizzle(Swizzle swizzle) {
    switch (swizzle) {
        case Swizzle::b32: return CU_TENSOR_MAP_SWIZZLE_32B;
        case Swizzle::b64: return CU_TENSOR_MAP_SWIZZLE_64B;
        case Swizzle::b128: return CU_TENSOR_MAP_SWIZZLE_128B;
        case Swizzle::none: break;
    }
    return CU_TENSOR_MAP_SWIZZLE_NONE;
}

}  // namespace

TensorMap detail::encode(const TensorMapShape& shape) {
    static const auto encode_tiled =
        gk::driver_function<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled", 12000);
    cuuint64_t sizes[kMostDimensions], strides[kMostDimensions];
    cuuint32_t box[kMostDimensions], steps[kMostDimensions];
    for (int i = 0; i < shape.rank; ++i) {
        sizes[i] = static_cast<cuuint64_t>(shape.size[i]);
        strides[i] = static_cast<cuuint64_t>(byte_stride(shape, i));
        box[i] = static_cast<cuuint32_t>(shape.box[i]);
        steps[i] = 1;
    }
    TensorMap map;
    const CUresult result = encode_tiled(
        reinterpret_cast<CUtensorMap*>(&map), driver_type(shape.dtype),
        static_cast<cuuint32_t>(shape.rank), const_cast<void*>(shape.base), sizes,
        strides + 1,  // the innermost dimension has no stride
        box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, driver_swizzle(shape.swizzle),
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        throw Error("the driver refused a tensor map with error " + std::to_string(result));
    }
    return map;
}

#endif

}  // namespace gk
