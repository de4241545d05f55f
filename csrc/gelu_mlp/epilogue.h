// What the GELU MLP's products do to their results, element by element, in every kernel that
// computes them. There is one definition, so the activation that a backward product rebuilds has
// the forward pass's bits, whichever kernels the two ran in.
#pragma once

#include "device/gelu.h"
#include "device/vector.h"

namespace gk {

// h becomes the gelu of the pre-activation as it is stored, rounded.
template <bool kTanh, class T, int N>
__device__ __forceinline__ void activate(float (&h)[N], const Pack<T, N>& rounded) {
    unpack_floats(h, rounded);
#pragma unroll
    for (int i = 0; i < N; ++i) h[i] *= gelu<kTanh>(h[i]).gate;
}

// d = da becomes dh = da gelu'(h), and h becomes gelu(h).
template <bool kTanh, int N>
__device__ __forceinline__ void differentiate(float (&d)[N], float (&h)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const Gelu g = gelu<kTanh>(h[i]);
        d[i] *= gelu_slope<kTanh>(h[i], g);
        h[i] *= g.gate;
    }
}

}  // namespace gk
