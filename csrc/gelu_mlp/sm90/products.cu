// The GELU MLP's products on Hopper, the builds for one operand layout; see gelu_mlp/sm90/kernel.h.
#include "gelu_mlp/sm90/launch.h"

namespace gk {

template void launch_product_sm90<Layout::GK_LAYOUT>(DType, const Product&, const ProductChoice&,
                                                     Stream);

}  // namespace gk
