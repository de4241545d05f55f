// The Python module: every launcher, with pointers as integers (0: absent). Nothing else includes
// pybind11.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "attention/params.h"
#include "attention/decode/params.h"
#include "runtime/launch.h"
#include "layer_norm/params.h"
#include "gelu_mlp/params.h"
#include "runtime/dry_run.h"
#ifdef GK_EMULATE
#include "emulator/memory/memory.h"
#endif

namespace py = pybind11;

namespace {

using gk::DType;

gk::Stream stream_of(int device, uintptr_t stream) {
    return {device, reinterpret_cast<cudaStream_t>(stream)};
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// A tensor's strides (batch, token, head) as Python's tuple.
using StrideTuple = std::tuple<int64_t, int64_t, int64_t>;

gk::Strides strides(const StrideTuple& of) {
    return {std::get<0>(of), std::get<1>(of), std::get<2>(of)};
}

py::dict described(const gk::Build& c) {
    return py::dict(py::arg("name") = c.name, py::arg("head_width") = c.head_width,
                    py::arg("tile_m") = c.tile_m, py::arg("tile_n") = c.tile_n,
                    py::arg("tile_k") = c.tile_k, py::arg("stages") = c.stages,
                    py::arg("consumers") = c.consumers, py::arg("cluster") = c.cluster,
                    py::arg("pingpong") = c.pingpong, py::arg("threads") = c.threads,
                    py::arg("shared_bytes") = c.shared_bytes);
}

py::list described(const std::vector<gk::Build>& builds) {
    py::list all;
    for (const gk::Build& c : builds) all.append(described(c));
    return all;
}

// What is in a plan: see dry_run.h.
py::dict described(const gk::DryRun& plan) {
    py::list launches, refusals;
    for (const gk::DryLaunch& p : plan.launches) {
        py::object built = py::none();
        if (p.built.name != nullptr) built = described(p.built);
        launches.append(py::dict(
            py::arg("kernel") = p.kernel, py::arg("shape") = p.shape,
            py::arg("grid") = py::make_tuple(p.grid[0], p.grid[1], p.grid[2]),
            py::arg("threads") = p.threads, py::arg("cluster") = p.cluster,
            py::arg("shared_bytes") = p.shared_bytes, py::arg("tiles") = p.tiles,
            py::arg("built") = built, py::arg("clocks") = p.clocks));
    }
    for (const gk::Refusal& r : plan.refusals) refusals.append(py::make_tuple(r.kernel, r.reason));
    return py::dict(py::arg("launches") = launches, py::arg("refusals") = refusals);
}

// Attention backward's arguments, for its launch and for the sizes of its workspaces.
template <class F>
void def_attention_bwd(py::module_& module, const char* name, F&& run) {
    module.def(
        name,
        [run](int device, uintptr_t stream, uintptr_t dout, uintptr_t dlse, uintptr_t q,
           uintptr_t k, uintptr_t v, uintptr_t out, uintptr_t lse, uintptr_t alibi_slopes,
           uintptr_t key_lengths, uintptr_t rng, uintptr_t cu_seqlens_q, uintptr_t cu_seqlens_k,
           uintptr_t dq_sum, uintptr_t delta, uintptr_t total, uintptr_t row_stats,
           uintptr_t turns, uintptr_t dq, uintptr_t dk, uintptr_t dv, int dtype, int batch, int Tq,
           int Tk, int total_q, int total_k, int H, int Hk, int D,
           StrideTuple q_strides, StrideTuple k_strides, StrideTuple v_strides,
           StrideTuple dout_strides, float scale, int left, int right, float softcap,
           uint32_t dropout_threshold, float dropout_scale, bool deterministic, int build) {
            const gk::AttentionCall call{
                batch, Tq, Tk, H, Hk, D, scale, left, right, softcap,
                pointer<const float>(alibi_slopes), pointer<const int32_t>(key_lengths),
                {pointer<const int64_t>(rng), dropout_threshold, dropout_scale},
                pointer<const int32_t>(cu_seqlens_q), pointer<const int32_t>(cu_seqlens_k), total_q,
                total_k};
            const gk::AttentionBwd p{call,
                                     pointer<const void>(q),
                                     pointer<const void>(k),
                                     pointer<const void>(v),
                                     pointer<const void>(dout),
                                     strides(q_strides),
                                     strides(k_strides),
                                     strides(v_strides),
                                     strides(dout_strides),
                                     pointer<const void>(out),
                                     pointer<const float>(lse),
                                     pointer<const float>(dlse),
                                     pointer<float>(delta),
                                     pointer<float>(total),
                                     pointer<float>(dq_sum),
                                     deterministic,
                                     pointer<float>(row_stats),
                                     pointer<int>(turns),
                                     pointer<void>(dq),
                                     pointer<void>(dk),
                                     pointer<void>(dv)};
            return run(static_cast<DType>(dtype), p, build, stream_of(device, stream));
        },
        py::arg("device"), py::arg("stream"), py::kw_only(), py::arg("dout"), py::arg("dlse"),
        py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"), py::arg("lse"),
        py::arg("alibi_slopes"), py::arg("key_lengths"), py::arg("rng"), py::arg("cu_seqlens_q"),
        py::arg("cu_seqlens_k"), py::arg("dq_sum"), py::arg("delta"), py::arg("total"),
        py::arg("row_stats"), py::arg("turns"), py::arg("dq"), py::arg("dk"), py::arg("dv"),
        py::arg("dtype"), py::arg("batch"), py::arg("Tq"), py::arg("Tk"), py::arg("total_q"),
        py::arg("total_k"), py::arg("H"), py::arg("Hk"), py::arg("D"), py::arg("q_strides"),
        py::arg("k_strides"), py::arg("v_strides"), py::arg("dout_strides"), py::arg("scale"),
        py::arg("left"), py::arg("right"), py::arg("softcap"), py::arg("dropout_threshold"),
        py::arg("dropout_scale"), py::arg("deterministic"), py::arg("build") = -1);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
#ifdef GK_EMULATE
    module.attr("emulated") = true;
    module.def(
        "emulator_declare",
        [](const char* name, uintptr_t address, size_t bytes, bool written) {
            gk::emulator::memory::declare(name, pointer<const void>(address), bytes, written);
        },
        py::arg("name"), py::arg("address"), py::arg("bytes"), py::arg("written"));
    module.def("emulator_forget", &gk::emulator::memory::forget);
#else
    module.attr("emulated") = false;
#endif
    module.def(
        "dry_run",
        [](int capability, int multiprocessors, const py::function& run) {
            const gk::DryRun plan(capability, multiprocessors);
            run();
            return described(plan);
        },
        py::arg("capability"), py::arg("multiprocessors"), py::arg("run"));
    module.def(
        "record",
        [](const py::function& run) {
            const gk::DryRun plan;
            run();
            return described(plan);
        },
        py::arg("run"));

    module.def(
        "attention_fwd",
        [](int device, uintptr_t stream, uintptr_t q, uintptr_t k, uintptr_t v,
           uintptr_t alibi_slopes, uintptr_t key_lengths, uintptr_t rng, uintptr_t cu_seqlens_q,
           uintptr_t cu_seqlens_k, uintptr_t out, uintptr_t lse, int dtype, int batch, int Tq,
           int Tk, int total_q, int total_k, int H, int Hk, int D,
           StrideTuple q_strides, StrideTuple k_strides, StrideTuple v_strides, float scale,
           int left, int right, float softcap, uint32_t dropout_threshold, float dropout_scale,
           int build) {
            const gk::AttentionCall call{
                batch, Tq, Tk, H, Hk, D, scale, left, right, softcap,
                pointer<const float>(alibi_slopes), pointer<const int32_t>(key_lengths),
                {pointer<const int64_t>(rng), dropout_threshold, dropout_scale},
                pointer<const int32_t>(cu_seqlens_q), pointer<const int32_t>(cu_seqlens_k), total_q,
                total_k};
            const gk::AttentionFwd p{call,
                                     pointer<const void>(q),
                                     pointer<const void>(k),
                                     pointer<const void>(v),
                                     strides(q_strides),
                                     strides(k_strides),
                                     strides(v_strides),
                                     pointer<void>(out),
                                     pointer<float>(lse)};
            gk::launch_attention_fwd(static_cast<DType>(dtype), p, build,
                                     stream_of(device, stream));
        },
        py::arg("device"), py::arg("stream"), py::kw_only(), py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("alibi_slopes"), py::arg("key_lengths"), py::arg("rng"),
        py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("out"), py::arg("lse"),
        py::arg("dtype"), py::arg("batch"), py::arg("Tq"), py::arg("Tk"), py::arg("total_q"),
        py::arg("total_k"), py::arg("H"), py::arg("Hk"), py::arg("D"), py::arg("q_strides"),
        py::arg("k_strides"), py::arg("v_strides"), py::arg("scale"), py::arg("left"),
        py::arg("right"), py::arg("softcap"), py::arg("dropout_threshold"),
        py::arg("dropout_scale"), py::arg("build"));
    module.def("attention_fwd_builds",
               [] { return described(gk::attention_fwd_builds()); });

    module.def("attention_bwd_builds",
               [] { return described(gk::attention_bwd_builds()); });
    def_attention_bwd(module, "attention_bwd", &gk::launch_attention_bwd);
    def_attention_bwd(module, "attention_bwd_workspaces",
                      [](DType dtype, const gk::AttentionBwd& p, int build, gk::Stream stream) {
                          const gk::BwdWorkspaces sizes =
                              gk::attention_bwd_workspaces(dtype, p, build, stream);
                          return std::make_tuple(sizes.row_stats, sizes.dq_sum, sizes.turns);
                      });

    module.def(
        "attention_decode",
        [](int device, uintptr_t stream, uintptr_t q, uintptr_t k, uintptr_t v,
           uintptr_t cache_lengths, uintptr_t block_table, uintptr_t alibi_slopes,
           uintptr_t partial_out, uintptr_t partial_stats, uintptr_t out, uintptr_t lse, int dtype,
           int batch, int Tq, int Tk, int H, int Hk, int D, int pages, int page, int cache_pages,
           StrideTuple q_strides, StrideTuple k_strides, StrideTuple v_strides, float scale,
           int left, float softcap, int num_splits, int splits) {
            gk::AttentionDecode p{};
            p.call.batch = batch, p.call.Tq = Tq, p.call.Tk = Tk;
            p.call.H = H, p.call.Hk = Hk, p.call.D = D;
            p.call.scale = scale, p.call.softcap = softcap;
            p.call.left = left, p.call.right = 0;
            p.call.alibi_slopes = pointer<const float>(alibi_slopes);
            p.call.key_lengths = pointer<const int32_t>(cache_lengths);
            p.q = pointer<const void>(q);
            p.k = pointer<const void>(k);
            p.v = pointer<const void>(v);
            p.q_strides = strides(q_strides);
            p.k_strides = strides(k_strides);
            p.v_strides = strides(v_strides);
            p.block_table = pointer<const int32_t>(block_table);
            p.pages = pages, p.page = page, p.cache_pages = cache_pages;
            p.num_splits = num_splits, p.splits = splits;
            p.partial_out = pointer<float>(partial_out);
            p.partial_stats = pointer<float>(partial_stats);
            p.out = pointer<void>(out);
            p.lse = pointer<float>(lse);
            gk::launch_attention_decode(static_cast<DType>(dtype), p, stream_of(device, stream));
        },
        py::arg("device"), py::arg("stream"), py::kw_only(), py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("cache_lengths"), py::arg("block_table"), py::arg("alibi_slopes"),
        py::arg("partial_out"), py::arg("partial_stats"), py::arg("out"), py::arg("lse"),
        py::arg("dtype"), py::arg("batch"), py::arg("Tq"), py::arg("Tk"), py::arg("H"),
        py::arg("Hk"), py::arg("D"), py::arg("pages"), py::arg("page"), py::arg("cache_pages"),
        py::arg("q_strides"), py::arg("k_strides"), py::arg("v_strides"), py::arg("scale"),
        py::arg("left"), py::arg("softcap"), py::arg("num_splits"), py::arg("splits"));

    module.def(
        "mlp_choice",
        [](int device, int layout, uintptr_t a, uintptr_t b, uintptr_t h, uintptr_t out,
           uintptr_t activation, int dtype, int64_t m, int64_t n, int64_t k, int64_t a_stride,
           int64_t b_stride, int build) {
            gk::Product p{};
            p.a = pointer<const void>(a);
            p.b = pointer<const void>(b);
            p.h = pointer<const void>(h);
            p.out = pointer<void>(out);
            p.activation = pointer<void>(activation);
            p.m = m, p.n = n, p.k = k;
            p.a_stride = a_stride, p.b_stride = b_stride;
            p.splits = 1;
            const auto plan = gk::choose_product(static_cast<DType>(dtype),
                                               static_cast<gk::Layout>(layout), p, build,
                                               device);
            return std::make_tuple(plan.build, plan.tile_rows, plan.splits);
        },
        py::arg("device"), py::arg("layout"), py::kw_only(), py::arg("a"), py::arg("b"),
        py::arg("h"), py::arg("out"), py::arg("activation"), py::arg("dtype"), py::arg("m"),
        py::arg("n"), py::arg("k"), py::arg("a_stride"), py::arg("b_stride"),
        py::arg("build"));
    module.def("mlp_builds", [] {
        py::list all;
        for (const gk::Build& c : gk::mlp_builds()) all.append(described(c));
        return all;
    });
    module.def(
        "mlp_linear_fwd",
        [](int device, uintptr_t stream, uintptr_t a, uintptr_t b, uintptr_t bias, uintptr_t out,
           uintptr_t activation, int dtype, int64_t m, int64_t n, int64_t k,
           int64_t a_stride, int64_t b_stride, bool tanh, int build) {
            gk::Product p{};
            p.a = pointer<const void>(a);
            p.b = pointer<const void>(b);
            p.bias = pointer<const void>(bias);
            p.out = pointer<void>(out);
            p.activation = pointer<void>(activation);
            p.m = m, p.n = n, p.k = k;
            p.a_stride = a_stride, p.b_stride = b_stride;
            p.splits = 1;
            p.tanh = tanh;
            gk::launch_product(static_cast<DType>(dtype), gk::Layout::forward, p, build,
                               stream_of(device, stream));
        },
        py::arg("device"), py::arg("stream"), py::kw_only(), py::arg("a"), py::arg("b"),
        py::arg("bias"), py::arg("out"), py::arg("activation"), py::arg("dtype"), py::arg("m"),
        py::arg("n"), py::arg("k"), py::arg("a_stride"), py::arg("b_stride"),
        py::arg("tanh"), py::arg("build"));
    module.def(
        "mlp_linear_bwd",
        [](int device, uintptr_t stream, uintptr_t a, uintptr_t b, uintptr_t h, uintptr_t out,
           uintptr_t activation, uintptr_t partial, int dtype, int64_t m, int64_t n, int64_t k,
           int64_t a_stride, int64_t b_stride, bool tanh, int build) {
            gk::Product p{};
            p.a = pointer<const void>(a);
            p.b = pointer<const void>(b);
            p.h = pointer<const void>(h);
            p.out = pointer<void>(out);
            p.activation = pointer<void>(activation);
            p.partial = pointer<float>(partial);
            p.m = m, p.n = n, p.k = k;
            p.a_stride = a_stride, p.b_stride = b_stride;
            p.splits = 1;
            p.tanh = tanh;
            gk::launch_product(static_cast<DType>(dtype), gk::Layout::backward, p, build,
                               stream_of(device, stream));
        },
        py::arg("device"), py::arg("stream"), py::kw_only(), py::arg("a"), py::arg("b"),
        py::arg("h"), py::arg("out"), py::arg("activation"), py::arg("partial"), py::arg("dtype"),
        py::arg("m"), py::arg("n"), py::arg("k"), py::arg("a_stride"), py::arg("b_stride"),
        py::arg("tanh"), py::arg("build"));
    module.def(
        "mlp_weight_grad",
        [](int device, uintptr_t stream, uintptr_t a, uintptr_t b, uintptr_t out,
           uintptr_t partial, int dtype, int64_t m, int64_t n, int64_t k, int64_t a_stride,
           int64_t b_stride, int splits, int build) {
            gk::Product p{};
            p.a = pointer<const void>(a);
            p.b = pointer<const void>(b);
            p.out = pointer<void>(out);
            p.partial = pointer<float>(partial);
            p.m = m, p.n = n, p.k = k;
            p.a_stride = a_stride, p.b_stride = b_stride;
            p.splits = splits;
            gk::launch_product(static_cast<DType>(dtype), gk::Layout::weight, p, build,
                               stream_of(device, stream));
        },
        py::arg("device"), py::arg("stream"), py::kw_only(), py::arg("a"), py::arg("b"),
        py::arg("out"), py::arg("partial"), py::arg("dtype"), py::arg("m"), py::arg("n"),
        py::arg("k"), py::arg("a_stride"), py::arg("b_stride"), py::arg("splits"),
        py::arg("build"));
    module.attr("mlp_column_sum_rows") = gk::kColumnSumRows;
    module.def(
        "mlp_column_sums",
        [](int device, uintptr_t stream, uintptr_t x, uintptr_t partial, int dtype, int64_t rows,
           int64_t cols, int64_t stride) {
            gk::launch_column_sums(
                static_cast<DType>(dtype),
                {pointer<const void>(x), pointer<float>(partial), rows, cols, stride},
                stream_of(device, stream));
        },
        py::arg("device"), py::arg("stream"), py::kw_only(), py::arg("x"), py::arg("partial"),
        py::arg("dtype"), py::arg("rows"), py::arg("cols"), py::arg("stride"));
    module.def(
        "mlp_partial_sums",
        [](int device, uintptr_t stream, uintptr_t partial, uintptr_t out, int dtype, int parts,
           int64_t cols) {
            gk::launch_partial_sums(
                static_cast<DType>(dtype),
                {pointer<const float>(partial), pointer<void>(out), parts, cols},
                stream_of(device, stream));
        },
        py::arg("device"), py::arg("stream"), py::kw_only(), py::arg("partial"), py::arg("out"),
        py::arg("dtype"), py::arg("parts"), py::arg("cols"));

    module.def(
        "layer_norm_fwd",
        [](int device, uintptr_t stream, uintptr_t x, uintptr_t residual, uintptr_t weight,
           uintptr_t bias, uintptr_t rng, uintptr_t y, uintptr_t sum, uintptr_t mean,
           uintptr_t rstd, int64_t rows, int cols, int64_t x_stride, int64_t residual_stride,
           float eps, uint32_t dropout_threshold, float dropout_scale, int x_dtype,
           int residual_dtype, int weight_dtype, int sum_dtype, int build) {
            gk::LayerNormFwd p;
            p.x = pointer<const void>(x);
            p.residual = pointer<const void>(residual);
            p.weight = pointer<const void>(weight);
            p.bias = pointer<const void>(bias);
            p.y = pointer<void>(y);
            p.sum = pointer<void>(sum);
            p.mean = pointer<float>(mean);
            p.rstd = pointer<float>(rstd);
            p.rows = rows;
            p.x_stride = x_stride;
            p.residual_stride = residual_stride;
            p.cols = cols;
            p.eps = eps;
            p.dropout = {pointer<const int64_t>(rng), dropout_threshold, dropout_scale};
            p.x_dtype = static_cast<DType>(x_dtype);
            p.residual_dtype = static_cast<DType>(residual_dtype);
            p.weight_dtype = static_cast<DType>(weight_dtype);
            p.sum_dtype = static_cast<DType>(sum_dtype);
            gk::launch_layer_norm_fwd(p, build, stream_of(device, stream));
        },
        py::arg("device"), py::arg("stream"), py::kw_only(), py::arg("x"), py::arg("residual"),
        py::arg("weight"), py::arg("bias"), py::arg("rng"), py::arg("y"), py::arg("sum"),
        py::arg("mean"), py::arg("rstd"), py::arg("rows"), py::arg("cols"), py::arg("x_stride"),
        py::arg("residual_stride"), py::arg("eps"), py::arg("dropout_threshold"),
        py::arg("dropout_scale"), py::arg("x_dtype"), py::arg("residual_dtype"),
        py::arg("weight_dtype"), py::arg("sum_dtype"), py::arg("build"));
    module.def("layer_norm_fwd_builds", [] { return described(gk::layer_norm_fwd_builds()); });
    module.def("layer_norm_bwd_builds", [] { return described(gk::layer_norm_bwd_builds()); });
    module.def("layer_norm_bwd_partials", &gk::layer_norm_bwd_partials, py::arg("rows"),
               py::arg("cols"), py::arg("device"), py::arg("build"));
    module.def(
        "layer_norm_bwd",
        [](int device, uintptr_t stream, uintptr_t dy, uintptr_t dsum, uintptr_t sum,
           uintptr_t mean, uintptr_t rstd, uintptr_t weight, uintptr_t rng, uintptr_t dx,
           uintptr_t dresidual, uintptr_t partial_dweight, uintptr_t partial_dbias,
           uintptr_t dweight, uintptr_t dbias, int64_t rows, int cols, int partials,
           int64_t sum_stride, uint32_t dropout_threshold, float dropout_scale, int x_dtype,
           int residual_dtype, int weight_dtype, int sum_dtype, int build) {
            gk::LayerNormBwd p;
            p.dy = pointer<const void>(dy);
            p.dsum = pointer<const void>(dsum);
            p.sum = pointer<const void>(sum);
            p.mean = pointer<const float>(mean);
            p.rstd = pointer<const float>(rstd);
            p.weight = pointer<const void>(weight);
            p.dx = pointer<void>(dx);
            p.dresidual = pointer<void>(dresidual);
            p.partial_dweight = pointer<float>(partial_dweight);
            p.partial_dbias = pointer<float>(partial_dbias);
            p.dweight = pointer<void>(dweight);
            p.dbias = pointer<void>(dbias);
            p.rows = rows;
            p.sum_stride = sum_stride;
            p.cols = cols;
            p.partials = partials;
            p.dropout = {pointer<const int64_t>(rng), dropout_threshold, dropout_scale};
            p.x_dtype = static_cast<DType>(x_dtype);
            p.residual_dtype = static_cast<DType>(residual_dtype);
            p.weight_dtype = static_cast<DType>(weight_dtype);
            p.sum_dtype = static_cast<DType>(sum_dtype);
            gk::launch_layer_norm_bwd(p, build, stream_of(device, stream));
        },
        py::arg("device"), py::arg("stream"), py::kw_only(), py::arg("dy"), py::arg("dsum"),
        py::arg("sum"), py::arg("mean"), py::arg("rstd"), py::arg("weight"), py::arg("rng"),
        py::arg("dx"), py::arg("dresidual"), py::arg("partial_dweight"), py::arg("partial_dbias"),
        py::arg("dweight"), py::arg("dbias"), py::arg("rows"), py::arg("cols"),
        py::arg("partials"), py::arg("sum_stride"), py::arg("dropout_threshold"),
        py::arg("dropout_scale"), py::arg("x_dtype"), py::arg("residual_dtype"),
        py::arg("weight_dtype"), py::arg("sum_dtype"), py::arg("build"));
}
