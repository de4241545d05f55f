// Instances of mlp_sm90_kernel.h: products in the layout Layout::weight.
#include "mlp_sm90_launch.h"

namespace gk {

void launch_weight_sm90(int candidate, DType dtype, const Product& p, Stream stream) {
    launch_product_sm90<Layout::weight>(candidate, dtype, p, stream);
}

}  // namespace gk
