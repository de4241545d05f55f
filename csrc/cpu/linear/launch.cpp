// The launcher of a linear layer of few rows: cuts the columns of y into parts.
#include <memory>
#include <new>

#include "cpu/dispatch.h"
#include "cpu/linear/params.h"
#include "cpu/parallel.h"

namespace gk::cpu {

void linear(const Linear& p, int threads) {
    const Kernels& run = kernels();
    const auto deleter = [](void* x) { ::operator delete(x, std::align_val_t(64)); };
    const std::unique_ptr<void, decltype(deleter)> x(
        ::operator new(run.linear_scratch(p), std::align_val_t(64)), deleter);
    run.linear_ready(p, x.get());
    const int64_t bytes = p.N * p.K * static_cast<int64_t>(bytes_of(p.dtype));
    parallel_for(p.N, worth(threads, bytes), [&](int64_t first, int64_t last) {
        run.linear(p, x.get(), first, last);
    });
}

}  // namespace gk::cpu
