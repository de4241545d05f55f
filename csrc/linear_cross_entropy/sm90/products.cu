// linear_cross_entropy's products on Hopper, the builds for one direction; see
// linear_cross_entropy/sm90/kernel.h.
#include "gelu_mlp/sm90/launch.h"
#include "linear_cross_entropy/choice.h"
#include "linear_cross_entropy/sm90/builds.h"
#include "linear_cross_entropy/sm90/kernel.h"

namespace gk {
namespace {

template <class Params>
constexpr bool kForward = std::is_same_v<Params, LossPartials>;

template <class T, int kNumber, class Params>
void launch_build(DType dtype, const Params& p, double clocks, const Stream& stream) {
    using C = ProductBuild<kNumber>;
    LogitsSm90<Params> kernel{product_sm90<C, Layout::forward>(dtype, product_of(p.logits)), p};
    const std::string shape = shape_of(p.logits) + " " + name_of(dtype);
    if constexpr (kForward<Params>) {
        launch(linear_cross_entropy_fwd_sm90_kernel<T, C>,
               product_launch<kNumber>("linear_cross_entropy_fwd for sm90", shape, kernel.product,
                                       clocks, stream),
               kernel);
    } else {
        kernel.product.out = tensor_map(dlogits_shape(dtype, p));
        kernel.product.has_out = true;
        launch(linear_cross_entropy_bwd_sm90_kernel<T, C>,
               product_launch<kNumber>("linear_cross_entropy_bwd for sm90", shape, kernel.product,
                                       clocks, stream),
               kernel);
    }
}

}  // namespace

template <class Params>
void launch_logits_sm90(DType dtype, const Params& p, const ProductChoice& choice, Stream stream) {
    with_number<kLogitsBuilds.size()>(choice.build, [&](auto number) {
        if (dtype == DType::bf16)
            launch_build<__nv_bfloat16, number>(dtype, p, choice.clocks, stream);
        else
            launch_build<__half, number>(dtype, p, choice.clocks, stream);
    });
}

template void launch_logits_sm90(DType, const GK_PARAMS&, const ProductChoice&, Stream);

}  // namespace gk
