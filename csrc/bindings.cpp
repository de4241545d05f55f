// The Python module: every launcher, with pointers as integers (0: absent). Nothing else includes
// pybind11.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

#include "attention.h"
#include "launch.h"
#ifdef GK_EMULATE
#include "emulator/memory.h"
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
        "attention_fwd",
        [](int device, uintptr_t stream, uintptr_t q, uintptr_t k, uintptr_t v,
           uintptr_t alibi_slopes, uintptr_t key_lengths, uintptr_t rng, uintptr_t out,
           uintptr_t lse, int dtype, int batch, int Tq, int Tk, int H, int Hk, int D,
           StrideTuple q_strides, StrideTuple k_strides, StrideTuple v_strides, float scale,
           int left, int right, float softcap, uint32_t dropout_threshold, float dropout_scale) {
            const gk::AttentionCall call{
                batch, Tq, Tk, H, Hk, D, scale, left, right, softcap,
                pointer<const float>(alibi_slopes), pointer<const int32_t>(key_lengths),
                {pointer<const int64_t>(rng), dropout_threshold, dropout_scale}};
            const gk::AttentionFwd p{call,
                                     pointer<const void>(q),
                                     pointer<const void>(k),
                                     pointer<const void>(v),
                                     strides(q_strides),
                                     strides(k_strides),
                                     strides(v_strides),
                                     pointer<void>(out),
                                     pointer<float>(lse)};
            gk::launch_attention_fwd(static_cast<DType>(dtype), p, stream_of(device, stream));
        },
        py::arg("device"), py::arg("stream"), py::kw_only(), py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("alibi_slopes"), py::arg("key_lengths"), py::arg("rng"),
        py::arg("out"), py::arg("lse"), py::arg("dtype"), py::arg("batch"), py::arg("Tq"),
        py::arg("Tk"), py::arg("H"), py::arg("Hk"), py::arg("D"), py::arg("q_strides"),
        py::arg("k_strides"), py::arg("v_strides"), py::arg("scale"), py::arg("left"),
        py::arg("right"), py::arg("softcap"), py::arg("dropout_threshold"),
        py::arg("dropout_scale"));
}
