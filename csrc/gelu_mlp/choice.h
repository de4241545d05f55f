// What the choice among the GELU MLP's products needs of the kernel for any GPU.
#pragma once

#include "gelu_mlp/params.h"
#include "runtime/choose.h"

namespace gk {

// Of gelu_mlp/products.cu: how that would make a product.
ProductChoice choose_product_any(Layout layout, int64_t m, int64_t n, int64_t k, int device);
void launch_product_any(DType dtype, Layout layout, const Product& p, const ProductChoice& choice,
                        Stream stream);

}  // namespace gk
