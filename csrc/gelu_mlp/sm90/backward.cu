// Instances of gelu_mlp/sm90/kernel.h: products in the layout Layout::backward.
#include "gelu_mlp/sm90/launch.h"

namespace gk {

void launch_backward_sm90(int build, DType dtype, const Product& p, Stream stream) {
    launch_product_sm90<Layout::backward>(build, dtype, p, stream);
}

}  // namespace gk
