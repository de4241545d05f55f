// What the choice among the GELU MLP's products needs to know of the kernel for any GPU, and what
// linear_cross_entropy, whose products have the same tiles, needs to know of that choice.
#pragma once

#include <string>

#include "gelu_mlp/params.h"
#include "runtime/choose.h"

namespace gk {

// In gelu_mlp/products.cu: how the kernel for any GPU would compute a product.
ProductChoice choose_product_any(Layout layout, int64_t m, int64_t n, int64_t k, int device);
void launch_product_any(DType dtype, Layout layout, const Product& p, const ProductChoice& choice,
                        Stream stream);

// In gelu_mlp/choice.cpp. Why no build can read a product's operands; "" if they can.
std::string operands_refuse(DType dtype, Layout layout, const Product& p);
// How long a warpgroup is predicted to take for 64 x 64 results of which it computes exponentials,
// in clocks.
extern const double kExponentialUnit;
// Chooses the build with the shortest predicted time, or the kernel for any GPU where that is
// predicted to be faster by enough. unit_clocks: how long a warpgroup takes for 64 x 64 results.
Choice product_by_rule(Layout layout, const Product& p, double unit_clocks, int processors);
// Completes the choice of a build: the rows of a tile, the splits of k and the predicted time.
ProductChoice product_choice(Layout layout, const Product& p, double unit_clocks, int build,
                             int device);

}  // namespace gk
