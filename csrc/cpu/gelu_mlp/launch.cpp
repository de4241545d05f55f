// GELU's launchers: cut the elements, or the rows, into parts.
#include <algorithm>
#include <memory>

#include "cpu/dispatch.h"
#include "cpu/gelu_mlp/params.h"
#include "cpu/parallel.h"

namespace gk::cpu {

void gelu_fwd(const GeluFwd& p, int threads) {
    const Kernels& run = kernels();
    // An exp and a division make an element worth 16 bytes of a plain copy.
    parallel_for(p.count, worth(threads, p.count * 16), [&](int64_t first, int64_t last) {
        run.gelu_fwd(p, first, last);
    });
}

void gelu_bwd(const GeluBwd& p, int threads) {
    const Kernels& run = kernels();
    threads = worth(threads, p.rows * p.cols * 32);
    if (p.db == nullptr)
        return parallel_for(p.rows, threads, [&](int64_t first, int64_t last) {
            run.gelu_bwd(p, nullptr, first, last);
        });
    // As in LayerNorm's: parts that depend on the shape alone.
    const int64_t most = std::clamp<int64_t>((4 << 20) / (4 * p.cols), 2, 64);
    const int64_t parts = std::clamp<int64_t>(p.rows / 16, 1, most);
    const auto sums = std::make_unique_for_overwrite<float[]>(parts * p.cols);
    parallel_for(parts, threads, [&](int64_t first_part, int64_t last_part) {
        for (int64_t part = first_part; part < last_part; ++part) {
            float* mine = sums.get() + part * p.cols;
            std::fill_n(mine, p.cols, 0.0f);
            run.gelu_bwd(p, mine, p.rows * part / parts, p.rows * (part + 1) / parts);
        }
    });
    run.add_rows(sums.get(), parts, p.cols, 0, p.cols);
    run.round(p.dtype, sums.get(), p.db, p.cols);
}

}  // namespace gk::cpu
