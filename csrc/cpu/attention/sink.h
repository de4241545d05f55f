// A sink: one more score of each query's softmax, which belongs to no key.
#pragma once

#include "cpu/exp.h"

namespace gk::cpu::GK_ISA {

// Adds a sink to what a query's keys make: the maximum of their scores, and the sum of exp(score -
// most). Returns what the sum of weighted values is multiplied by to be a result: 0 where there are
// no keys, whatever the sink is.
static inline Floats add_sink(Floats sink, Floats& most, Floats& sum) {
    const Floats top = most > sink ? most : sink;
    const Floats base = top == -__builtin_inff() ? Floats{} : top;
    const Floats part = exp_of(most - base);
    const Floats total = multiply_add(sum, part, exp_of(sink - base));
    const Floats by = sum == 0.0f ? Floats{} : part / total;
    most = top;
    sum = total;
    return by;
}

}  // namespace gk::cpu::GK_ISA
