// What the choice among the GELU MLP's products needs to know of the kernel for any GPU.
#pragma once

#include "gelu_mlp/params.h"
#include "runtime/choose.h"

namespace gk {

// In gelu_mlp/products.cu: how the kernel for any GPU would compute a product.
ProductChoice choose_product_any(Layout layout, int64_t m, int64_t n, int64_t k, int device);
void launch_product_any(DType dtype, Layout layout, const Product& p, const ProductChoice& choice,
                        Stream stream);

}  // namespace gk
