// GELU and its derivative beside PyTorch's products, each one pass over memory.
//
//     a = gelu(h)                                     forward: reads h, writes a
//     dh = da gelu'(h), db = sum over rows of dh      backward: reads h and da, writes dh, and a
//                                                     again where w2's gradient needs it
// "none": gelu(h) = h cdf(h), gelu'(h) = cdf(h) + h pdf(h). "tanh": gelu(h) = h s with
// s = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (h + 0.044715 h^3), which is 0.5 h (1 + tanh(u)).
#pragma once

#include "cpu/dtype.h"

namespace gk::cpu {

struct GeluFwd {
    const void* h;  // (count,)
    void* a;        // (count,)
    int64_t count;
    bool tanh;
    DType dtype;
};

struct GeluBwd {
    const void* h;   // (rows, cols)
    const void* da;  // (rows, cols)
    void* dh;        // (rows, cols); may be da
    void* a;         // (rows, cols); or null
    void* db;        // (cols,); or null
    int64_t rows, cols;
    bool tanh;
    DType dtype;
};

// count, rows and cols are at least 1. `threads`: the most that run.
void gelu_fwd(const GeluFwd& p, int threads);
void gelu_bwd(const GeluBwd& p, int threads);

}  // namespace gk::cpu
