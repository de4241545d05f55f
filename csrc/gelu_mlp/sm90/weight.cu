// Instances of gelu_mlp/sm90/kernel.h: products in the layout Layout::weight.
#include "gelu_mlp/sm90/launch.h"

namespace gk {

void launch_weight_sm90(int build, DType dtype, const Product& p, Stream stream) {
    launch_product_sm90<Layout::weight>(build, dtype, p, stream);
}

}  // namespace gk
