// exp and the normal distribution function, to a few units in the last place of fp32.
#pragma once

#include "cpu/vec.h"

namespace gk::cpu::GK_ISA {

constexpr float kLog2e = 1.44269504089f, kLn2 = 0.69314718056f;

// 2^f for |f| <= 1/2: the polynomial that equals it at seven Chebyshev nodes (its relative error is
// 2.5e-9).
static inline Floats power_of_2(Floats f) {
    Floats p = multiply_add(f, 0.000154614446986f, 0.00134004281776f);
    p = multiply_add(p, f, 0.00961805667852f);
    p = multiply_add(p, f, 0.0555032722667f);
    p = multiply_add(p, f, 0.240226509223f);
    p = multiply_add(p, f, 0.693147206703f);
    return multiply_add(p, f, 1.0f);
}

// 2^x, whose relative error is 1e-7: the polynomial is one degree lower, and exact at 0. Results
// below the smallest normal number are 0. NaN stays.
static inline Floats exp2_of(Floats x) {
    const Floats f = from_nearest(x);
    Floats p = multiply_add(f, 0.00132647272526f, 0.00967151278578f);
    p = multiply_add(p, f, 0.0555073374447f);
    p = multiply_add(p, f, 0.240222420831f);
    p = multiply_add(p, f, 0.693146977598f);
    return times_power_of_2(multiply_add(p, f, 1.0f), x - f);
}

// exp(x), likewise.
static inline Floats exp_of(Floats x) {
    const Floats y = x * 1.44269504089f;
    Floats clamped = y < -127.0f ? all(-127.0f) : y;
    clamped = clamped > 127.5f ? all(127.5f) : clamped;
    const Floats shifted = clamped + 0x1.8p23f;  // rounds to an integer, in the lower bits
    const Floats n = shifted - 0x1.8p23f;
    // The remainder from x itself: y has lost digits that x still has. ln 2 in two parts.
    Floats f = multiply_add(n, -0.693145751953125f, x);
    f = multiply_add(n, -1.42860676533e-6f, f) * 1.44269504089f;
    const Floats power = as_floats((as_words(shifted) + 127) << 23);
    Floats found = power_of_2(f) * power;
    found = y < -126.0f ? Floats{} : found;
    found = y > 127.5f ? all(__builtin_inff()) : found;
    return x == x ? found : x;
}

// tanh(x). Near 0 Cephes' polynomial (Moshier, tanhf.c), whose relative error is 1e-7; further off
// 1 - 2 / (exp(2x) + 1), whose digits are all good there.
static inline Floats tanh_of(Floats x) {
    const Floats square = x * x, size = as_floats(as_words(x) & 0x7fffffff);
    Floats p = multiply_add(square, -5.70498872745e-3f, 2.06390887954e-2f);
    p = multiply_add(p, square, -5.37397155531e-2f);
    p = multiply_add(p, square, 1.33314422036e-1f);
    p = multiply_add(p, square, -3.33332819422e-1f);
    const Floats near = multiply_add(p * square, x, x);
    const Floats far = 1.0f - 2.0f / (exp_of(size + size) + 1.0f);
    const Floats signed_far = as_floats(as_words(far) | (as_words(x) & 0x80000000));
    return size < 0.625f ? near : signed_far;
}

// The standard normal distribution function of x, and exp(-x^2 / 2). With z = |x| / sqrt(2),
//     erfc(z) = 2 exp(-z^2) R(t),   t = 1 / (1 + 0.36 z),
// where R is the polynomial that equals the right-hand side at ten Chebyshev nodes of 0 <= z <= 7
// (its relative error is 2.7e-9). The form is that of Abramowitz and Stegun, 7.1.26.
static inline Floats normal_cdf(Floats x, Floats& bell) {
    const Floats size = as_floats(as_words(x) & 0x7fffffff);
    const Floats t = 1.0f / multiply_add(size, 0.254558441227f, 1.0f);
    bell = exp_of(x * x * -0.5f);
    Floats r = multiply_add(t, 0.0369392344623f, -0.199858159129f);
    r = multiply_add(r, t, 0.380522628871f);
    r = multiply_add(r, t, -0.313949935177f);
    r = multiply_add(r, t, 0.289758692189f);
    r = multiply_add(r, t, -0.0141987614019f);
    r = multiply_add(r, t, 0.122098767971f);
    r = multiply_add(r, t, 0.0966406111534f);
    r = multiply_add(r, t, 0.10207093175f);
    r = multiply_add(r, t, -2.40099244811e-5f);
    const Floats below = bell * r;
    return x < 0.0f ? below : 1.0f - below;
}

}  // namespace gk::cpu::GK_ISA
