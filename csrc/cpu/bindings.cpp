// The Python module gptkernels._cpu: the launchers, with addresses and sizes.
// gptkernels/core/cpu.py calls it, and the ops' files cpu.py. Arguments are passed by position, in
// the order of the structs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "cpu/attention/decode/params.h"
#include "cpu/attention/params.h"
#include "cpu/cross_entropy/params.h"
#include "cpu/decoder/params.h"
#include "cpu/dispatch.h"
#include "cpu/gelu_mlp/params.h"
#include "cpu/layer_norm/params.h"
#include "cpu/linear/params.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace gk::cpu {
namespace {

// A tensor's address; 0 for an absent one.
template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Dropout dropout(uintptr_t rng, uint32_t threshold, float scale) {
    return {at<const int64_t>(rng), threshold, scale};
}

// An attention call's sizes, numbers and tensors, as gptkernels/ops/attention/cpu/dense.py packs
// them.
using Sizes = std::array<int64_t, 10>;  // batch, Tq, Tk, H, Hk, D, Dv, left, right, alibi_stride
using Numbers = std::array<float, 2>;   // softmax_scale, softcap
using Tensors = std::array<uintptr_t, 5>;  // alibi_slopes, sinks, key_lengths, cu_seqlens_q and _k
using GivenMask = std::array<int64_t, 7>;  // address, batch, head, query, key; kind, dtype
using GivenDropout = std::tuple<uintptr_t, uint32_t, float>;
using GivenStrides = std::array<int64_t, 3>;

AttentionCall attention_call(const Sizes& n, const Numbers& x, const Tensors& t, const GivenMask& m,
                             const GivenDropout& d, int dtype) {
    const Mask mask{reinterpret_cast<const void*>(m[0]), {m[1], m[2], m[3], m[4]},
                    MaskKind(m[5]), DType(m[6])};
    return {n[0], n[1], n[2], n[3], n[4], n[5], n[6], x[0], n[7], n[8], x[1],
            at<const float>(t[0]), n[9], at<const float>(t[1]), at<const int32_t>(t[2]),
            at<const int32_t>(t[3]), at<const int32_t>(t[4]), mask,
            dropout(std::get<0>(d), std::get<1>(d), std::get<2>(d)), DType(dtype)};
}

Strides strides(const GivenStrides& s) { return {s[0], s[1], s[2]}; }

void def_attention(py::module_& module) {
    module.def("attention_fwd", [](const Sizes& sizes, const Numbers& numbers,
                                   const Tensors& tensors, const GivenMask& mask,
                                   const GivenDropout& dropout, int dtype,
                                   std::array<uintptr_t, 3> inputs,
                                   std::array<GivenStrides, 3> by, uintptr_t out, uintptr_t lse,
                                   int threads) {
        const py::gil_scoped_release release;
        attention_fwd({attention_call(sizes, numbers, tensors, mask, dropout, dtype),
                       at<const void>(inputs[0]), at<const void>(inputs[1]),
                       at<const void>(inputs[2]), strides(by[0]), strides(by[1]), strides(by[2]),
                       at<void>(out), at<float>(lse)},
                      threads);
    });
    module.def("attention_bwd", [](const Sizes& sizes, const Numbers& numbers,
                                   const Tensors& tensors, const GivenMask& mask,
                                   const GivenDropout& dropout, int dtype,
                                   std::array<uintptr_t, 4> inputs,
                                   std::array<GivenStrides, 4> by, uintptr_t out, uintptr_t lse,
                                   uintptr_t dlse, std::array<uintptr_t, 5> gradients,
                                   std::array<int64_t, 4> mask_by, int threads) {
        const py::gil_scoped_release release;
        attention_bwd({attention_call(sizes, numbers, tensors, mask, dropout, dtype),
                       at<const void>(inputs[0]), at<const void>(inputs[1]),
                       at<const void>(inputs[2]), at<const void>(inputs[3]), strides(by[0]),
                       strides(by[1]), strides(by[2]), strides(by[3]), at<const void>(out),
                       at<const float>(lse), at<const float>(dlse), at<void>(gradients[0]),
                       at<void>(gradients[1]), at<void>(gradients[2]), at<float>(gradients[3]),
                       {mask_by[0], mask_by[1], mask_by[2], mask_by[3]},
                       at<float>(gradients[4])},
                      threads);
    });
}

void def_attention_decode(py::module_& module) {
    module.def("attention_decode", [](uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t slopes,
                                      uintptr_t sinks, uintptr_t lengths, uintptr_t table,
                                      uintptr_t out, uintptr_t lse, const GivenStrides& q_strides,
                                      const GivenStrides& k_strides, const GivenStrides& v_strides,
                                      int64_t B, int64_t Tq, int64_t Tk, int64_t H, int64_t Hk,
                                      int64_t D, int64_t Dv, int64_t pages, int64_t page,
                                      int64_t cache_pages, int64_t left, int64_t right,
                                      int64_t alibi_stride, int64_t num_splits, float scale,
                                      float softcap, int dtype, int threads) {
        const AttentionDecode p{at<const void>(q), at<const void>(k), at<const void>(v),
                                at<const float>(slopes), at<const float>(sinks),
                                at<const int32_t>(lengths), at<const int32_t>(table),
                                at<void>(out), at<float>(lse), strides(q_strides),
                                strides(k_strides), strides(v_strides), B, Tq, Tk, H, Hk, D, Dv,
                                pages, page, cache_pages, left, right, alibi_stride, num_splits,
                                scale, softcap, DType(dtype)};
        const py::gil_scoped_release release;
        attention_decode(p, threads);
    });
}

void def_layer_norm(py::module_& module) {
    module.def("layer_norm_fwd", [](uintptr_t x, uintptr_t residual, uintptr_t weight,
                                    uintptr_t bias, uintptr_t y, uintptr_t sum, uintptr_t mean,
                                    uintptr_t rstd, int64_t rows, int64_t cols, int64_t x_stride,
                                    int64_t residual_stride, float eps, uintptr_t rng,
                                    uint32_t threshold, float scale, int x_dtype,
                                    int residual_dtype, int weight_dtype, int sum_dtype,
                                    int threads) {
        const py::gil_scoped_release release;
        layer_norm_fwd({at<const void>(x), at<const void>(residual), at<const void>(weight),
                        at<const void>(bias), at<void>(y), at<void>(sum), at<float>(mean),
                        at<float>(rstd), rows, cols, x_stride, residual_stride, eps,
                        dropout(rng, threshold, scale), DType(x_dtype), DType(residual_dtype),
                        DType(weight_dtype), DType(sum_dtype)},
                       threads);
    });
    module.def("layer_norm_bwd", [](uintptr_t dy, uintptr_t dsum, uintptr_t sum, uintptr_t mean,
                                    uintptr_t rstd, uintptr_t weight, uintptr_t dx,
                                    uintptr_t dresidual, uintptr_t dweight, uintptr_t dbias,
                                    int64_t rows, int64_t cols, int64_t sum_stride, uintptr_t rng,
                                    uint32_t threshold, float scale, int x_dtype,
                                    int residual_dtype, int weight_dtype, int sum_dtype,
                                    int threads) {
        const py::gil_scoped_release release;
        layer_norm_bwd({at<const void>(dy), at<const void>(dsum), at<const void>(sum),
                        at<const float>(mean), at<const float>(rstd), at<const void>(weight),
                        at<void>(dx), at<void>(dresidual), at<void>(dweight), at<void>(dbias),
                        rows, cols, sum_stride, dropout(rng, threshold, scale), DType(x_dtype),
                        DType(residual_dtype), DType(weight_dtype), DType(sum_dtype)},
                       threads);
    });
}

void def_gelu(py::module_& module) {
    module.def("gelu_fwd", [](uintptr_t h, uintptr_t a, int64_t count, bool tanh, int dtype,
                              int threads) {
        const py::gil_scoped_release release;
        gelu_fwd({at<const void>(h), at<void>(a), count, tanh, DType(dtype)}, threads);
    });
    module.def("gelu_bwd", [](uintptr_t h, uintptr_t da, uintptr_t dh, uintptr_t a, uintptr_t db,
                              int64_t rows, int64_t cols, bool tanh, int dtype, int threads) {
        const py::gil_scoped_release release;
        gelu_bwd({at<const void>(h), at<const void>(da), at<void>(dh), at<void>(a), at<void>(db),
                  rows, cols, tanh, DType(dtype)},
                 threads);
    });
}

void def_cross_entropy(py::module_& module) {
    module.def("cross_entropy", [](uintptr_t logits, uintptr_t targets, uintptr_t dloss,
                                   uintptr_t losses, uintptr_t lse, int64_t rows, int64_t cols,
                                   int64_t stride, int64_t ignore_index, float smoothing,
                                   float z_loss, float softcap, int dtype, int threads) {
        const py::gil_scoped_release release;
        cross_entropy({at<void>(logits), at<const int64_t>(targets), at<const float>(dloss),
                       at<float>(losses), at<float>(lse), rows, cols, stride, ignore_index,
                       smoothing, z_loss, softcap, DType(dtype)},
                      threads);
    });
    module.def("accumulate", [](uintptr_t sum, uintptr_t part, uintptr_t out, int64_t count,
                                bool first, int dtype, int threads) {
        const py::gil_scoped_release release;
        accumulate({at<float>(sum), at<const void>(part), at<void>(out), count, first,
                    DType(dtype)},
                   threads);
    });
}

void def_linear(py::module_& module) {
    module.def("linear", [](uintptr_t x, uintptr_t w, uintptr_t b, uintptr_t y, int64_t M,
                            int64_t N, int64_t K, int64_t x_stride, int64_t w_stride, int dtype,
                            bool transposed, int threads) {
        const py::gil_scoped_release release;
        linear({at<const void>(x), at<const void>(w), at<const void>(b), at<void>(y), M, N, K,
                x_stride, w_stride, DType(dtype), transposed},
               threads);
    });
    module.attr("most_rows") = kMostRows;
}

// A block as gptkernels/gpt/cached_blocks.py packs it: addresses, strides and sizes; eps.
using GivenBlock = std::tuple<std::array<int64_t, 21>, std::array<float, 2>>;
using GivenNorm = std::tuple<uintptr_t, uintptr_t, float>;

DecoderBlock decoder_block(const GivenBlock& given) {
    const auto& [n, eps] = given;
    const auto norm = [&](int i, float by) { return Norm{at<const void>(n[i]),
                                                         at<const void>(n[i + 1]), by}; };
    const auto weights = [&](int i) { return Weights{at<const void>(n[i]),
                                                     at<const void>(n[i + 1]), n[i + 2]}; };
    return {norm(0, eps[0]), norm(2, eps[1]), weights(4), weights(7), weights(10), weights(13),
            at<void>(n[16]), at<void>(n[17]), n[18], n[19], n[20] != 0};
}

void def_decoder(py::module_& module) {
    module.def("decoder_step", [](uintptr_t x, uintptr_t y, uintptr_t positions, uintptr_t lengths,
                                  const std::array<int64_t, 7>& sizes, float scale, bool pre_norm,
                                  const GivenNorm& ln_f, int dtype,
                                  const std::vector<GivenBlock>& given, int threads) {
        const auto [R, T, Tmax, C, H, Hk, D] = sizes;
        const DecoderStep p{at<const void>(x), at<void>(y), at<const int64_t>(positions),
                            at<const int32_t>(lengths), R, T, Tmax, C, H, Hk, D, scale, pre_norm,
                            {at<const void>(std::get<0>(ln_f)), at<const void>(std::get<1>(ln_f)),
                             std::get<2>(ln_f)},
                            DType(dtype)};
        std::vector<DecoderBlock> blocks;
        for (const GivenBlock& block : given) blocks.push_back(decoder_block(block));
        const py::gil_scoped_release release;
        decoder_step(p, blocks, threads);
    });
}

void def_dropout(py::module_& module) {
    module.def("elementwise_keep", [](uintptr_t rng, uint32_t threshold, uintptr_t keep,
                                      int64_t count, int threads) {
        const py::gil_scoped_release release;
        const ElementwiseKeep p{dropout(rng, threshold, 0), at<uint8_t>(keep), count};
        elementwise_keep(p, threads);
    });
    module.def("attention_keep", [](uintptr_t rng, uint32_t threshold, uintptr_t keep,
                                    int64_t heads, int64_t rows, int64_t cols, int64_t first_row,
                                    int64_t first_head, int threads) {
        const py::gil_scoped_release release;
        const AttentionKeep p{dropout(rng, threshold, 0), at<uint8_t>(keep), heads, rows, cols,
                              first_row, first_head};
        attention_keep(p, threads);
    });
}

}  // namespace
}  // namespace gk::cpu

PYBIND11_MODULE(_cpu, module) {
    using namespace gk::cpu;
    module.attr("compiled_for") = GK_COMPILED_FOR;
    module.def("instruction_sets", &instruction_sets);
    module.def("instruction_set", [] { return kernels().isa; });
    module.def("use", &use);
    module.def("prefer", &prefer);
    module.def("threads_library", &threads_library);
    def_attention_decode(module);
    def_layer_norm(module);
    def_gelu(module);
    def_cross_entropy(module);
    def_linear(module);
    def_decoder(module);
    def_dropout(module);
    def_attention(module);
}
