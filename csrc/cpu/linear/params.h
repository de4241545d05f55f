// A linear layer of few rows, on a CPU: y = x w^T + b.
//
// Bytes (the floor): w is read once. A product of matrices is made for many rows, where each number
// of w is used often; here memory sets the time.
#pragma once

#include "cpu/dtype.h"

namespace gk::cpu {

constexpr int kMostRows = 16;

// The tensors have one dtype, and unit strides between columns.
struct Linear {
    const void* x;  // (M, K)
    const void* w;  // (N, K); transposed: (K, N), as Conv1D's
    const void* b;  // (N,), or null
    void* y;        // (M, N), contiguous
    int64_t M, N, K, x_stride, w_stride;
    DType dtype;
    bool transposed;
};

// 1 <= M <= kMostRows, N and K are at least 1. A row's bits do not depend on the others. `threads`:
// the most that run.
void linear(const Linear& p, int threads);

}  // namespace gk::cpu
