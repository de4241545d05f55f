// Instances of mlp_sm90_kernel.h: products in the layout Layout::forward.
#include "mlp_sm90_launch.h"

namespace gk {

void launch_forward_sm90(int candidate, DType dtype, const Product& p, Stream stream) {
    launch_product_sm90<Layout::forward>(candidate, dtype, p, stream);
}

}  // namespace gk
