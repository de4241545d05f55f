#include "runtime/choose.h"

namespace gk {

std::string build_refuses(const Build& build, DType dtype, bool options, int width) {
    if (build.head_width != width)
        return "it is for heads up to " + std::to_string(build.head_width) +
               " wide, and these are for kernels of width " + std::to_string(width);
    if (is_compiled(build.rule, dtype, options)) return "";
    return std::string("it is not built for ") + name_of(dtype) + (options ? " with options" : "");
}

std::string number_refuses(std::span<const Build> builds, int number) {
    if (number < static_cast<int>(builds.size())) return "";
    return "there are " + std::to_string(builds.size()) + " builds";
}

void refuse_build(const char* kernel, const std::string& shape, int number,
                  const std::string& reason) {
    throw Error(std::string(kernel) + " on " + shape + ": build " + std::to_string(number) +
                " cannot run: " + reason);
}

}  // namespace gk
