// Which kernel computes linear_cross_entropy's logits, and with which tiles. The choice is that of
// the GELU MLP's products, whose tiles these kernels have (gelu_mlp/choice.cpp).
#include "linear_cross_entropy/choice.h"

#include "linear_cross_entropy/sm90/builds.h"
#include "runtime/dry_run.h"

namespace gk {
namespace {

constexpr const char* kFwd = "linear_cross_entropy_fwd for sm90";
constexpr const char* kBwd = "linear_cross_entropy_bwd for sm90";

std::string outputs_refuse(DType, const LossPartials&) { return ""; }
std::string outputs_refuse(DType dtype, const LogitGradients& p) {
    const char* reason = tensor_map_refuses(dlogits_shape(dtype, p));
    return reason == nullptr ? "" : std::string("dlogits: ") + reason;
}

struct LogitsChoice {
    ProductChoice product;
    std::string reason;  // why no build for Hopper was chosen on such a GPU, or ""
};

template <class Params>
LogitsChoice choose_logits(const char* name, DType dtype, const Params& p, int build, int device) {
    const Product product = product_of(p.logits);
    const Choice choice = choose(
        name, kLogitsBuilds, p.logits, build, device,
        [&] {
            std::string reason = operands_refuse(dtype, Layout::forward, product);
            return reason.empty() ? outputs_refuse(dtype, p) : reason;
        },
        [&](int number) { return build_refuses(kLogitsBuilds[number], dtype); },
        [&] {
            return product_by_rule(Layout::forward, product, kExponentialUnit,
                                   multiprocessors(device));
        });
    return {product_choice(Layout::forward, product, kExponentialUnit, choice.build, device),
            choice.reason};
}

template <class Params, class Any>
void launch_logits(const char* name, DType dtype, const Params& p, int build, Stream stream,
                   Any&& any) {
    const LogitsChoice choice = choose_logits(name, dtype, p, build, stream.device);
    dry_run_refused(name, choice.reason);
    if (choice.product.build == kAnyGpu) return any(dtype, p, choice.product, stream);
    launch_logits_sm90(dtype, p, choice.product, stream);
}

}  // namespace

std::vector<Build> linear_cross_entropy_builds() {
    return {kLogitsBuilds.begin(), kLogitsBuilds.end()};
}

int64_t linear_cross_entropy_tiles(DType dtype, const LossPartials& p, int build, Stream stream) {
    const ProductChoice choice = choose_logits(kFwd, dtype, p, build, stream.device).product;
    // The tiles of the kernel for any GPU are square.
    const int cols =
        choice.build == kAnyGpu ? choice.tile_rows : kLogitsBuilds[choice.build].tile_n;
    return divide_up(p.logits.classes, cols);
}

void launch_linear_cross_entropy_partials(DType dtype, const LossPartials& p, int build,
                                          Stream stream) {
    launch_logits(kFwd, dtype, p, build, stream, launch_partials_any);
}

void launch_linear_cross_entropy_dlogits(DType dtype, const LogitGradients& p, int build,
                                         Stream stream) {
    launch_logits(kBwd, dtype, p, build, stream, launch_dlogits_any);
}

}  // namespace gk
