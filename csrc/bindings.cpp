// The Python module: every launcher, with the table of its params. Only this file and
// runtime/members.h include pybind11.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "attention/decode/params.h"
#include "attention/params.h"
#include "gelu_mlp/params.h"
#include "layer_norm/params.h"
#include "linear_cross_entropy/params.h"
#include "runtime/context.h"
#include "runtime/dry_run.h"
#include "runtime/launch.h"
#include "runtime/members.h"
#ifdef GK_EMULATE
#include "emulator/memory/memory.h"
#endif

namespace py = pybind11;

namespace gk {

template <>
void set<Strides>(void* member, py::handle given) {
    Strides& strides = *static_cast<Strides*>(member);
    std::tie(strides.batch, strides.token, strides.head) =
        given.cast<std::tuple<int64_t, int64_t, int64_t>>();
}
template <>
constexpr const char* kArgument<Layout> = "layout";

namespace {

// ---- The tables: the name by which Python knows each member.

const Table kDropout =
    table(member("rng", &Dropout::rng), member("dropout_threshold", &Dropout::threshold),
          member("dropout_scale", &Dropout::scale));

// The members of AttentionCall that every attention op sets.
using Call = AttentionCall;
const Table kScores =
    table(member("alibi_slopes", &Call::alibi_slopes), member("sinks", &Call::sinks),
          member("key_lengths", &Call::key_lengths),
          member("batch", &Call::batch), member("Tq", &Call::Tq), member("Tk", &Call::Tk),
          member("H", &Call::H), member("Hk", &Call::Hk), member("D", &Call::D),
          member("softmax_scale", &Call::softmax_scale), member("left", &Call::left),
          member("right", &Call::right), member("softcap", &Call::softcap),
          member("alibi_stride", &Call::alibi_stride));

// The members of AttentionCall, as attention forward and backward set them.
const Table kCall =
    table(kScores, inside(&Call::dropout, kDropout), member("cu_seqlens_q", &Call::cu_seqlens_q),
          member("cu_seqlens_k", &Call::cu_seqlens_k), member("total_q", &Call::total_q),
          member("total_k", &Call::total_k));

template <class Params>
Table operands() {
    return table(member("q", &Params::q), member("k", &Params::k), member("v", &Params::v),
                 member("q_strides", &Params::q_strides), member("k_strides", &Params::k_strides),
                 member("v_strides", &Params::v_strides));
}

using Fwd = AttentionFwd;
const Table kAttentionFwd = table(operands<Fwd>(), inside(&Fwd::call, kCall),
                                  member("out", &Fwd::out), member("lse", &Fwd::lse));

using Bwd = AttentionBwd;
const Table kAttentionBwd =
    table(operands<Bwd>(), member("dout", &Bwd::dout), member("out", &Bwd::out),
          member("lse", &Bwd::lse), member("dlse", &Bwd::dlse), inside(&Bwd::call, kCall),
          member("dout_strides", &Bwd::dout_strides),
          member("deterministic", &Bwd::deterministic), member("dq", &Bwd::dq),
          member("dk", &Bwd::dk), member("dv", &Bwd::dv), member("by_query", &Bwd::by_query),
          member("delta", &Bwd::delta),
          member("total", &Bwd::total), member("dq_sum", &Bwd::dq_sum),
          member("row_stats", &Bwd::row_stats), member("turns", &Bwd::turns));

using Decode = AttentionDecode;
const Table kAttentionDecode =
    table(operands<Decode>(), inside(&Decode::call, kScores),
          member("block_table", &Decode::block_table), member("pages", &Decode::pages),
          member("page", &Decode::page), member("cache_pages", &Decode::cache_pages),
          member("num_splits", &Decode::num_splits), member("out", &Decode::out),
          member("lse", &Decode::lse), member("partial_out", &Decode::partial_out),
          member("partial_stats", &Decode::partial_stats));

const Table kProduct =
    table(member("a", &Product::a), member("b", &Product::b), member("bias", &Product::bias),
          member("h", &Product::h), member("addend", &Product::addend),
          member("out", &Product::out), member("activation", &Product::activation),
          member("partial", &Product::partial), member("total", &Product::total),
          member("m", &Product::m), member("n", &Product::n), member("k", &Product::k),
          member("a_stride", &Product::a_stride), member("b_stride", &Product::b_stride),
          member("splits", &Product::splits), member("tanh", &Product::tanh));

const Table kColumnSums =
    table(member("x", &ColumnSums::x), member("partial", &ColumnSums::partial),
          member("rows", &ColumnSums::rows), member("cols", &ColumnSums::cols),
          member("stride", &ColumnSums::stride));

const Table kPartialSums =
    table(member("partial", &PartialSums::partial), member("out", &PartialSums::out),
          member("parts", &PartialSums::parts), member("cols", &PartialSums::cols));

// The members that LayerNorm has in both directions.
template <class Norm>
Table layer_norm() {
    return table(member("sum", &Norm::sum), member("mean", &Norm::mean),
                 member("rstd", &Norm::rstd), member("weight", &Norm::weight),
                 member("rows", &Norm::rows), member("cols", &Norm::cols),
                 inside(&Norm::dropout, kDropout), member("x_dtype", &Norm::x_dtype),
                 member("residual_dtype", &Norm::residual_dtype),
                 member("weight_dtype", &Norm::weight_dtype),
                 member("sum_dtype", &Norm::sum_dtype));
}

using NormFwd = LayerNormFwd;
const Table kLayerNormFwd =
    table(member("x", &NormFwd::x), member("residual", &NormFwd::residual),
          member("bias", &NormFwd::bias), member("y", &NormFwd::y), layer_norm<NormFwd>(),
          member("x_stride", &NormFwd::x_stride),
          member("residual_stride", &NormFwd::residual_stride), member("eps", &NormFwd::eps));

using NormBwd = LayerNormBwd;
const Table kLayerNormBwd =
    table(member("dy", &NormBwd::dy), member("dsum", &NormBwd::dsum), layer_norm<NormBwd>(),
          member("dx", &NormBwd::dx), member("dresidual", &NormBwd::dresidual),
          member("partial_dweight", &NormBwd::partial_dweight),
          member("partial_dbias", &NormBwd::partial_dbias), member("dweight", &NormBwd::dweight),
          member("dbias", &NormBwd::dbias), member("sum_stride", &NormBwd::sum_stride),
          member("partials", &NormBwd::partials));

const Table kLogits =
    table(member("x", &Logits::x), member("weight", &Logits::weight), member("bias", &Logits::bias),
          member("targets", &Logits::targets), member("rows", &Logits::rows),
          member("classes", &Logits::classes), member("width", &Logits::width),
          member("x_stride", &Logits::x_stride), member("weight_stride", &Logits::weight_stride),
          member("softcap", &Logits::softcap));

const Table kLossOptions = table(member("ignore_index", &LossOptions::ignore_index),
                                 member("label_smoothing", &LossOptions::label_smoothing),
                                 member("z_loss", &LossOptions::z_loss));

const Table kLossPartials =
    table(inside(&LossPartials::logits, kLogits), member("highest", &LossPartials::highest),
          member("exponential", &LossPartials::exponential), member("sum", &LossPartials::sum),
          member("at_target", &LossPartials::at_target));

const Table kLossSums =
    table(member("targets", &LossSums::targets), member("highest", &LossSums::highest),
          member("exponential", &LossSums::exponential), member("sum", &LossSums::sum),
          member("at_target", &LossSums::at_target), member("losses", &LossSums::losses),
          member("lse", &LossSums::lse), member("rows", &LossSums::rows),
          member("classes", &LossSums::classes), member("tiles", &LossSums::tiles),
          inside(&LossSums::options, kLossOptions));

using Gradients = LogitGradients;
const Table kLogitGradients =
    table(inside(&Gradients::logits, kLogits), member("lse", &Gradients::lse),
          member("dloss", &Gradients::dloss), member("dlogits", &Gradients::dlogits),
          member("dlogits_stride", &Gradients::dlogits_stride), member("first", &Gradients::first),
          member("all", &Gradients::all), inside(&Gradients::options, kLossOptions));

// ---- The module

py::dict described(const Build& c) {
    return py::dict(py::arg("name") = c.name, py::arg("head_width") = c.head_width,
                    py::arg("tile_m") = c.tile_m, py::arg("tile_n") = c.tile_n,
                    py::arg("tile_k") = c.tile_k, py::arg("stages") = c.stages,
                    py::arg("consumers") = c.consumers, py::arg("cluster") = c.cluster,
                    py::arg("pingpong") = c.pingpong, py::arg("threads") = c.threads,
                    py::arg("shared_bytes") = c.shared_bytes);
}

py::list described(const std::vector<Build>& builds) {
    py::list all;
    for (const Build& c : builds) all.append(described(c));
    return all;
}

// runtime/dry_run.h says what the members mean.
py::dict described(const DryRun& run) {
    py::list launches, refusals;
    for (const DryLaunch& p : run.launches) {
        py::object built = py::none();
        if (p.built.name != nullptr) built = described(p.built);
        launches.append(py::dict(
            py::arg("kernel") = p.kernel, py::arg("shape") = p.shape,
            py::arg("grid") = py::make_tuple(p.grid[0], p.grid[1], p.grid[2]),
            py::arg("threads") = p.threads, py::arg("cluster") = p.cluster,
            py::arg("shared_bytes") = p.shared_bytes, py::arg("tiles") = p.tiles,
            py::arg("built") = built, py::arg("clocks") = p.clocks));
    }
    for (const Refusal& r : run.refusals) refusals.append(py::make_tuple(r.kernel, r.reason));
    return py::dict(py::arg("launches") = launches, py::arg("refusals") = refusals);
}

void def_attention(py::module_& module) {
    def(module, "attention_fwd", kAttentionFwd, &launch_attention_fwd);
    def(module, "attention_bwd", kAttentionBwd, &launch_attention_bwd);
    def(module, "attention_bwd_workspaces", kAttentionBwd,
        +[](DType dtype, const Bwd& p, int build, Stream stream) {
            const BwdWorkspaces sizes = attention_bwd_workspaces(dtype, p, build, stream);
            return std::tuple{sizes.delta, sizes.total, sizes.dq_sum, sizes.row_stats, sizes.turns};
        });
    def(module, "attention_decode", kAttentionDecode, &launch_attention_decode);
    def(module, "attention_decode_workspaces", kAttentionDecode,
        +[](DType, const Decode& p, Stream) {
            const DecodeWorkspaces sizes = attention_decode_workspaces(p);
            return std::tuple{sizes.partial_out, sizes.partial_stats};
        });
    module.def("attention_fwd_builds", [] { return described(attention_fwd_builds()); });
    module.def("attention_bwd_builds", [] { return described(attention_bwd_builds()); });
}

void def_gelu_mlp(py::module_& module) {
    def(module, "gelu_mlp_product", kProduct, &launch_product);
    def(module, "gelu_mlp_product_partials", kProduct, &product_partials);
    def(module, "gelu_mlp_column_sums", kColumnSums, &launch_column_sums);
    def(module, "gelu_mlp_partial_sums", kPartialSums, &launch_partial_sums);
    module.def("gelu_mlp_column_sum_parts", &column_sum_parts);
    module.def("gelu_mlp_builds", [] { return described(gelu_mlp_builds()); });
}

void def_layer_norm(py::module_& module) {
    def(module, "layer_norm_fwd", kLayerNormFwd, &launch_layer_norm_fwd);
    def(module, "layer_norm_bwd", kLayerNormBwd, &launch_layer_norm_bwd);
    module.def("layer_norm_bwd_partials", [](int64_t rows, int cols, int device, int build) {
        const Context context(device);
        return layer_norm_bwd_partials(rows, cols, device, build);
    });
    module.def("layer_norm_fwd_builds", [] { return described(layer_norm_fwd_builds()); });
    module.def("layer_norm_bwd_builds", [] { return described(layer_norm_bwd_builds()); });
}

void def_linear_cross_entropy(py::module_& module) {
    def(module, "linear_cross_entropy_tiles", kLossPartials, &linear_cross_entropy_tiles);
    def(module, "linear_cross_entropy_partials", kLossPartials,
        &launch_linear_cross_entropy_partials);
    def(module, "linear_cross_entropy_losses", kLossSums, &launch_linear_cross_entropy_losses);
    def(module, "linear_cross_entropy_dlogits", kLogitGradients,
        &launch_linear_cross_entropy_dlogits);
    module.def("linear_cross_entropy_builds",
               [] { return described(linear_cross_entropy_builds()); });
}

void def_emulator(py::module_& module) {
#ifdef GK_EMULATE
    module.attr("emulated") = true;
    module.def("emulator_declare",
               [](const char* name, uintptr_t address, size_t bytes, bool written) {
                   emulator::memory::declare(name, reinterpret_cast<const void*>(address), bytes,
                                             written);
               });
    module.def("emulator_forget", &emulator::memory::forget);
#else
    module.attr("emulated") = false;
#endif
}

}  // namespace
}  // namespace gk

PYBIND11_MODULE(_cuda, module) {
    using namespace gk;
    module.attr("compiled_for") = GK_COMPILED_FOR;
    module.attr("fields") = py::dict();
    def_emulator(module);
    module.def("capability", &capability);
    module.def("dry_run", [](int capability, int multiprocessors, const py::function& run) {
        const DryRun dry_run(capability, multiprocessors);
        run();
        return described(dry_run);
    });
    module.def("record", [](const py::function& run) {
        const DryRun dry_run;
        run();
        return described(dry_run);
    });
    def_attention(module);
    def_gelu_mlp(module);
    def_layer_norm(module);
    def_linear_cross_entropy(module);
}
