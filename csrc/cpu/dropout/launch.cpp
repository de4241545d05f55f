// The launchers of the keep masks: cut the elements, or the rows, into parts.
#include "cpu/dispatch.h"
#include "cpu/dropout/params.h"
#include "cpu/parallel.h"

namespace gk::cpu {

void elementwise_keep(const ElementwiseKeep& p, int threads) {
    const Kernels& run = kernels();
    parallel_for(p.count, worth(threads, p.count * 8), [&](int64_t first, int64_t last) {
        run.elementwise_keep(p, first, last);
    });
}

void attention_keep(const AttentionKeep& p, int threads) {
    const Kernels& run = kernels();
    const int64_t rows = p.heads * p.rows;
    parallel_for(rows, worth(threads, rows * p.cols * 8), [&](int64_t first, int64_t last) {
        run.attention_keep(p, first, last);
    });
}

}  // namespace gk::cpu
