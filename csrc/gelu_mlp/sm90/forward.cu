// Instances of gelu_mlp/sm90/kernel.h: products in the layout Layout::forward.
#include "gelu_mlp/sm90/launch.h"

namespace gk {

void launch_forward_sm90(int build, DType dtype, const Product& p, Stream stream) {
    launch_product_sm90<Layout::forward>(build, dtype, p, stream);
}

}  // namespace gk
