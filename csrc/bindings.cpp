// The Python module: every launcher, with pointers as integers (0: absent). Nothing else includes
// pybind11.
#include <pybind11/pybind11.h>

#include <cstdint>

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
}
