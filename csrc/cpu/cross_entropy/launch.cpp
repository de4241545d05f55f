// Cuts the rows, or the numbers, into parts.
#include "cpu/cross_entropy/params.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace gk::cpu {

void cross_entropy(const CrossEntropy& p, int threads) {
    const Kernels& run = kernels();
    // Two exponentials make a number worth 32 bytes of a plain copy.
    parallel_for(p.rows, worth(threads, p.rows * p.cols * 32), [&](int64_t first, int64_t last) {
        run.cross_entropy(p, first, last);
    });
}

void accumulate(const Accumulate& p, int threads) {
    const Kernels& run = kernels();
    parallel_for(p.count, worth(threads, p.count * 10), [&](int64_t first, int64_t last) {
        run.accumulate(p, first, last);
    });
}

}  // namespace gk::cpu
