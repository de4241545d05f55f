// LayerNorm's launchers: cut the rows into parts.
#include <algorithm>
#include <memory>

#include "cpu/dispatch.h"
#include "cpu/layer_norm/params.h"
#include "cpu/parallel.h"

namespace gk::cpu {
namespace {

// A parameter in fp32: itself, or a copy.
class Widened {
  public:
    Widened(DType dtype, const void* from, int64_t n) : at(static_cast<const float*>(from)) {
        if (from == nullptr || dtype == DType::float32) return;
        copy_ = std::make_unique_for_overwrite<float[]>(n);
        kernels().widen(dtype, from, copy_.get(), n);
        at = copy_.get();
    }

    const float* at;

  private:
    std::unique_ptr<float[]> copy_;
};

}  // namespace

void layer_norm_fwd(const LayerNormFwd& p, int threads) {
    const Kernels& run = kernels();
    const Widened weight(p.weight_dtype, p.weight, p.cols), bias(p.weight_dtype, p.bias, p.cols);
    parallel_for(p.rows, worth(threads, p.rows * p.cols * 4), [&](int64_t first, int64_t last) {
        run.layer_norm_fwd(p, weight.at, bias.at, first, last);
    });
}

void layer_norm_bwd(const LayerNormBwd& p, int threads) {
    const Kernels& run = kernels();
    const Widened weight(p.weight_dtype, p.weight, p.cols);
    threads = worth(threads, p.rows * p.cols * 8);
    if (p.dweight == nullptr && p.dbias == nullptr)
        return parallel_for(p.rows, threads, [&](int64_t first, int64_t last) {
            run.layer_norm_bwd(p, weight.at, nullptr, nullptr, first, last);
        });
    // Each part of the rows has sums of its own, which are added at the end in their order. The
    // parts depend on the shape alone, so the bits do not depend on the number of threads.
    const int64_t most = std::clamp<int64_t>((4 << 20) / (8 * p.cols), 2, 64);
    const int64_t parts = std::clamp<int64_t>(p.rows / 16, 1, most);
    const int64_t size = 2 * p.cols;  // of a part's sums: weight's, then bias's
    const auto sums = std::make_unique_for_overwrite<float[]>(parts * size);
    parallel_for(parts, threads, [&](int64_t first_part, int64_t last_part) {
        for (int64_t part = first_part; part < last_part; ++part) {
            float* mine = sums.get() + part * size;
            std::fill_n(mine, size, 0.0f);
            run.layer_norm_bwd(p, weight.at, p.dweight == nullptr ? nullptr : mine,
                               p.dbias == nullptr ? nullptr : mine + p.cols,
                               p.rows * part / parts, p.rows * (part + 1) / parts);
        }
    });
    parallel_for(size, worth(threads, parts * size * 4), [&](int64_t first, int64_t last) {
        run.add_rows(sums.get(), parts, size, first, last);
    });
    if (p.dweight != nullptr) run.round(p.weight_dtype, sums.get(), p.dweight, p.cols);
    if (p.dbias != nullptr) run.round(p.weight_dtype, sums.get() + p.cols, p.dbias, p.cols);
}

}  // namespace gk::cpu
