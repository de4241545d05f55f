// What the choice among linear_cross_entropy's products needs to know of each of them.
#pragma once

#include "gelu_mlp/choice.h"
#include "linear_cross_entropy/params.h"

namespace gk {

// The product of the logits, as the choice among the GELU MLP's builds knows products.
inline Product product_of(const Logits& p) {
    Product product{};
    product.a = p.x;
    product.b = p.weight;
    product.m = p.rows;
    product.n = p.classes;
    product.k = p.width;
    product.a_stride = p.x_stride;
    product.b_stride = p.weight_stride;
    product.splits = 1;
    return product;
}

// In linear_cross_entropy/products.cu: for any GPU.
void launch_partials_any(DType dtype, const LossPartials& p, const ProductChoice& choice,
                         Stream stream);
void launch_dlogits_any(DType dtype, const LogitGradients& p, const ProductChoice& choice,
                        Stream stream);

}  // namespace gk
