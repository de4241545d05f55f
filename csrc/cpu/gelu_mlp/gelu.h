// gelu(h) and its derivative; params.h has the formulas.
#pragma once

#include "cpu/exp.h"

namespace gk::cpu::GK_ISA {

template <bool kTanh, bool kSlope>
static inline Floats gelu(Floats h, Floats& slope) {
    if (kTanh) {
        // 2 sqrt(2 / pi) and 0.044715 times it
        const Floats square = h * h;
        const Floats u = h * multiply_add(square, 0.0713548162726f, 1.59576912161f);
        const Floats e = exp_of(-u), s = 1.0f / (e + 1.0f);
        if (kSlope) {
            // 1 - s would lose the digits that a factor of h^3 then brings to light.
            const Floats rest = (e < 1e38f ? e : all(1e38f)) * s;
            slope = multiply_add(h * s * rest,
                                 multiply_add(square, 0.214064448818f, 1.59576912161f), s);
        }
        return h * s;
    }
    Floats bell;
    const Floats cdf = normal_cdf(h, bell);
    if (kSlope) slope = multiply_add(h * bell, 0.398942280401f, cdf);  // 1 / sqrt(2 pi)
    return h * cdf;
}

}  // namespace gk::cpu::GK_ISA
