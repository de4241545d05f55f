// The Python module: every launcher, made from the tables of what its params hold. Nothing else
// includes pybind11.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#include "attention/decode/params.h"
#include "attention/params.h"
#include "gelu_mlp/params.h"
#include "layer_norm/params.h"
#include "runtime/dry_run.h"
#include "runtime/launch.h"
#include "runtime/members.h"
#ifdef GK_EMULATE
#include "emulator/memory/memory.h"
#endif

namespace py = pybind11;

namespace {

using namespace gk;

// ---- The tables: under which name Python knows each member.

constexpr auto kDropout =
    table(member("rng", &Dropout::rng), member("dropout_threshold", &Dropout::threshold),
          member("dropout_scale", &Dropout::scale));

// Of attention in all its forms.
using Call = AttentionCall;
constexpr auto kScores =
    table(member("alibi_slopes", &Call::alibi_slopes), member("key_lengths", &Call::key_lengths),
          member("batch", &Call::batch), member("Tq", &Call::Tq), member("Tk", &Call::Tk),
          member("H", &Call::H), member("Hk", &Call::Hk), member("D", &Call::D),
          member("softmax_scale", &Call::softmax_scale), member("left", &Call::left),
          member("right", &Call::right), member("softcap", &Call::softcap));

// Of attention forward and backward.
constexpr auto kCall =
    table(kScores, inside(&Call::dropout, kDropout), member("cu_seqlens_q", &Call::cu_seqlens_q),
          member("cu_seqlens_k", &Call::cu_seqlens_k), member("total_q", &Call::total_q),
          member("total_k", &Call::total_k));

template <class Params>
constexpr auto kOperands =
    table(member("q", &Params::q), member("k", &Params::k), member("v", &Params::v),
          member("q_strides", &Params::q_strides), member("k_strides", &Params::k_strides),
          member("v_strides", &Params::v_strides));

using Fwd = AttentionFwd;
constexpr auto kAttentionFwd = table(kOperands<Fwd>, inside(&Fwd::call, kCall),
                                     member("out", &Fwd::out), member("lse", &Fwd::lse));

using Bwd = AttentionBwd;
constexpr auto kAttentionBwd =
    table(kOperands<Bwd>, member("dout", &Bwd::dout), member("dout_strides", &Bwd::dout_strides),
          member("out", &Bwd::out), member("lse", &Bwd::lse), member("dlse", &Bwd::dlse),
          inside(&Bwd::call, kCall), member("deterministic", &Bwd::deterministic),
          member("dq", &Bwd::dq), member("dk", &Bwd::dk), member("dv", &Bwd::dv),
          member("delta", &Bwd::delta), member("total", &Bwd::total),
          member("dq_sum", &Bwd::dq_sum), member("row_stats", &Bwd::row_stats),
          member("turns", &Bwd::turns));

using Decode = AttentionDecode;
constexpr auto kAttentionDecode =
    table(kOperands<Decode>, inside(&Decode::call, kScores),
          member("block_table", &Decode::block_table), member("pages", &Decode::pages),
          member("page", &Decode::page), member("cache_pages", &Decode::cache_pages),
          member("num_splits", &Decode::num_splits), member("out", &Decode::out),
          member("lse", &Decode::lse), member("partial_out", &Decode::partial_out),
          member("partial_stats", &Decode::partial_stats));

constexpr auto kProduct =
    table(member("a", &Product::a), member("b", &Product::b), member("bias", &Product::bias),
          member("h", &Product::h), member("out", &Product::out),
          member("activation", &Product::activation), member("partial", &Product::partial),
          member("m", &Product::m), member("n", &Product::n), member("k", &Product::k),
          member("a_stride", &Product::a_stride), member("b_stride", &Product::b_stride),
          member("splits", &Product::splits), member("tanh", &Product::tanh));

constexpr auto kColumnSums =
    table(member("x", &ColumnSums::x), member("partial", &ColumnSums::partial),
          member("rows", &ColumnSums::rows), member("cols", &ColumnSums::cols),
          member("stride", &ColumnSums::stride));

constexpr auto kPartialSums =
    table(member("partial", &PartialSums::partial), member("out", &PartialSums::out),
          member("parts", &PartialSums::parts), member("cols", &PartialSums::cols));

// Of LayerNorm in both directions.
template <class Norm>
constexpr auto kNorm =
    table(member("sum", &Norm::sum), member("mean", &Norm::mean), member("rstd", &Norm::rstd),
          member("weight", &Norm::weight), member("rows", &Norm::rows), member("cols", &Norm::cols),
          inside(&Norm::dropout, kDropout), member("x_dtype", &Norm::x_dtype),
          member("residual_dtype", &Norm::residual_dtype),
          member("weight_dtype", &Norm::weight_dtype), member("sum_dtype", &Norm::sum_dtype));

using NormFwd = LayerNormFwd;
constexpr auto kLayerNormFwd =
    table(member("x", &NormFwd::x), member("residual", &NormFwd::residual), kNorm<NormFwd>,
          member("bias", &NormFwd::bias), member("y", &NormFwd::y),
          member("x_stride", &NormFwd::x_stride),
          member("residual_stride", &NormFwd::residual_stride), member("eps", &NormFwd::eps));

using NormBwd = LayerNormBwd;
constexpr auto kLayerNormBwd =
    table(member("dy", &NormBwd::dy), member("dsum", &NormBwd::dsum), kNorm<NormBwd>,
          member("dx", &NormBwd::dx), member("dresidual", &NormBwd::dresidual),
          member("partial_dweight", &NormBwd::partial_dweight),
          member("partial_dbias", &NormBwd::partial_dbias), member("dweight", &NormBwd::dweight),
          member("dbias", &NormBwd::dbias), member("sum_stride", &NormBwd::sum_stride),
          member("partials", &NormBwd::partials));

constexpr auto kBuild =
    table(member("name", &Build::name), member("head_width", &Build::head_width),
          member("tile_m", &Build::tile_m), member("tile_n", &Build::tile_n),
          member("tile_k", &Build::tile_k), member("stages", &Build::stages),
          member("consumers", &Build::consumers), member("cluster", &Build::cluster),
          member("pingpong", &Build::pingpong), member("threads", &Build::threads),
          member("shared_bytes", &Build::shared_bytes));

constexpr auto kDryLaunch =
    table(member("kernel", &DryLaunch::kernel), member("shape", &DryLaunch::shape),
          member("threads", &DryLaunch::threads), member("cluster", &DryLaunch::cluster),
          member("shared_bytes", &DryLaunch::shared_bytes), member("tiles", &DryLaunch::tiles));

// ---- To Python

template <class Struct>
py::dict described(const Struct& of, const auto& members) {
    py::dict found;
    const auto add = [&](const auto& member) {
        found[member.name] = std::invoke(member.reach, of);
    };
    std::apply([&](const auto&... all) { (add(all), ...); }, members);
    return found;
}

py::list described(const std::vector<Build>& builds) {
    py::list all;
    for (const Build& build : builds) all.append(described(build, kBuild));
    return all;
}

// See dry_run.h.
py::dict described(const DryRun& run) {
    py::list launches, refusals;
    for (const DryLaunch& launch : run.launches) {
        py::dict one = described(launch, kDryLaunch);
        one["grid"] = py::make_tuple(launch.grid[0], launch.grid[1], launch.grid[2]);
        one["built"] = launch.built.name == nullptr
                           ? py::object(py::none())
                           : py::object(described(launch.built, kBuild));
        launches.append(one);
    }
    for (const Refusal& r : run.refusals) refusals.append(py::make_tuple(r.kernel, r.reason));
    py::dict found;
    found["launches"] = launches, found["refusals"] = refusals;
    return found;
}

// ---- From Python

// What a member comes as: an address (0: absent), a number of an enumerator, three strides.
using StridesTuple = std::tuple<int64_t, int64_t, int64_t>;
template <class Value>
using Given = std::conditional_t<
    std::is_pointer_v<Value>, uintptr_t,
    std::conditional_t<
        std::is_enum_v<Value>, int,
        std::conditional_t<std::is_same_v<Value, Strides>, StridesTuple, Value>>>;

template <class Value>
Value taken(const Given<Value>& given) {
    if constexpr (std::is_pointer_v<Value>)
        return reinterpret_cast<Value>(given);
    else if constexpr (std::is_same_v<Value, Strides>)
        return {std::get<0>(given), std::get<1>(given), std::get<2>(given)};
    else
        return static_cast<Value>(given);
}

// What launchers take beside their params, told apart by its type: those of it that one takes.
template <class Value, class... All>
constexpr auto beside(const char* name) {
    if constexpr ((std::is_same_v<Value, All> || ...))
        return member(name, [](std::tuple<All...>& all) -> Value& { return std::get<Value>(all); });
    else
        return table();
}

template <class Params, class... All>
constexpr auto fields_of(const auto& members) {
    const auto params = [](std::tuple<All...>& all) -> Params& { return std::get<Params>(all); };
    return in_order<std::tuple<All...>>(
        table(inside(params, members), beside<DType, All...>("dtype"),
              beside<Layout, All...>("layout"), beside<int, All...>("build")));
}

// Exports a launcher. It takes its device and stream, then all others by position; module.fields has
// their names.
template <class Params, class Result, class... Taken>
void def(py::module_& module, const char* name, const auto& members, Result (*launch)(Taken...)) {
    using All = std::tuple<std::remove_cvref_t<Taken>...>;
    const auto bind = [&]<class... Reach>(const Member<Reach>&... field) {
        module.def(name, [launch, ... reach = field.reach](
                             int device, uintptr_t stream, Given<ValueOf<All, Reach>>... given) {
            All all{};
            std::get<Stream>(all) = {device, reinterpret_cast<cudaStream_t>(stream)};
            ((std::invoke(reach, all) = taken<ValueOf<All, Reach>>(given)), ...);
            return std::apply(launch, all);
        });
        module.attr("fields")[name] = py::make_tuple(field.name...);
    };
    std::apply(bind, fields_of<Params, std::remove_cvref_t<Taken>...>(members));
}

void def_attention(py::module_& module) {
    def<Fwd>(module, "attention_fwd", kAttentionFwd, &launch_attention_fwd);
    def<Bwd>(module, "attention_bwd", kAttentionBwd, &launch_attention_bwd);
    def<Bwd>(module, "attention_bwd_workspaces", kAttentionBwd,
             +[](DType dtype, const Bwd& p, Stream stream, int build) {
                 const auto sizes = attention_bwd_workspaces(dtype, p, stream, build);
                 return std::tuple{sizes.delta, sizes.total, sizes.dq_sum, sizes.row_stats,
                                   sizes.turns};
             });
    def<Decode>(module, "attention_decode", kAttentionDecode, &launch_attention_decode);
    def<Decode>(module, "attention_decode_workspaces", kAttentionDecode,
                +[](DType, const Decode& p, Stream) {
                    const auto sizes = attention_decode_workspaces(p);
                    return std::tuple{sizes.partial_out, sizes.partial_stats};
                });
    module.def("attention_fwd_builds", [] { return described(attention_fwd_builds()); });
    module.def("attention_bwd_builds", [] { return described(attention_bwd_builds()); });
}

void def_gelu_mlp(py::module_& module) {
    def<Product>(module, "gelu_mlp_product", kProduct, &launch_product);
    def<Product>(module, "gelu_mlp_product_partials", kProduct, &product_partials);
    def<ColumnSums>(module, "gelu_mlp_column_sums", kColumnSums, &launch_column_sums);
    def<PartialSums>(module, "gelu_mlp_partial_sums", kPartialSums, &launch_partial_sums);
    module.def("gelu_mlp_column_sum_parts", &column_sum_parts);
    module.def("gelu_mlp_builds", [] { return described(gelu_mlp_builds()); });
}

void def_layer_norm(py::module_& module) {
    def<NormFwd>(module, "layer_norm_fwd", kLayerNormFwd, &launch_layer_norm_fwd);
    def<NormBwd>(module, "layer_norm_bwd", kLayerNormBwd, &launch_layer_norm_bwd);
    module.def("layer_norm_bwd_partials", &layer_norm_bwd_partials);
    module.def("layer_norm_fwd_builds", [] { return described(layer_norm_fwd_builds()); });
    module.def("layer_norm_bwd_builds", [] { return described(layer_norm_bwd_builds()); });
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

PYBIND11_MODULE(_cuda, module) {
    module.attr("fields") = py::dict();
    def_emulator(module);
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
}
