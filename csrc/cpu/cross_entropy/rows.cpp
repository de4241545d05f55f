// The rows first ... last - 1, one after the other.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/exp.h"
#include "cpu/kernels.h"

namespace gk::cpu::GK_ISA {
namespace {

// So many numbers are added up in fp32, the sums of such parts in fp64: a vocabulary has 10^5.
constexpr int64_t kPart = 4096;

// The logit behind the softcap, and its derivative by the one before it.
template <bool kCapped>
static inline Floats capped(Floats l, float softcap, Floats& slope) {
    if (!kCapped) return l;
    const Floats t = tanh_of(l / softcap);
    slope = 1.0f - t * t;
    return t * softcap;
}

template <class T>
float largest(const T* logits, int64_t cols) {
    const float lowest = -std::numeric_limits<float>::infinity();
    Floats most[4] = {all(lowest), all(lowest), all(lowest), all(lowest)};
    int64_t i = 0;
    for (; i + 4 * kWidth <= cols; i += 4 * kWidth)
        for (int k = 0; k < 4; ++k) {
            const Floats l = load(logits + i + k * kWidth);
            most[k] = l > most[k] ? l : most[k];
        }
    for_vectors(i, cols, [&](int64_t j, auto n) {
        const Floats l = first_lanes(load_at(logits + j, n), n, all(lowest));
        most[0] = l > most[0] ? l : most[0];
    });
    float found = lowest;
    for (const Floats& some : most)
        for (int lane = 0; lane < kWidth; ++lane) found = std::max(found, some[lane]);
    return found;
}

struct Sums {
    double exps, logits;  // of exp(l - highest), and of l where smoothing needs it
};

template <class T, bool kCapped>
Sums sums_of(const T* logits, int64_t cols, float highest, float softcap, bool smoothed) {
    Sums found{};
    for (int64_t first = 0; first < cols; first += kPart) {
        Floats exps{}, sum{};
        for_vectors(first, std::min(first + kPart, cols), [&](int64_t i, auto n) {
            Floats slope;
            const Floats l = capped<kCapped>(load_at(logits + i, n), softcap, slope);
            exps += first_lanes(exp2_of((l - highest) * kLog2e), n);
            if (smoothed) sum += first_lanes(l, n);
        });
        found.exps += sum_of_lanes(exps);
        if (smoothed) found.logits += sum_of_lanes(sum);
    }
    return found;
}

// Writes the gradient over the logits. scale: of exp(l - highest), p's other factor and dloss.
template <class T, bool kCapped>
void differentiate(const CrossEntropy& p, T* logits, float highest, float scale, float dloss,
                   int64_t target) {
    const float each = dloss * p.smoothing / static_cast<float>(p.cols);
    const auto gradient = [&](Floats l, Floats at) {
        Floats slope;
        l = capped<kCapped>(l, p.softcap, slope);
        const Floats d = multiply_add(exp2_of((l - highest) * kLog2e), scale, -each) - at;
        return kCapped ? d * slope : d;
    };
    // The target's is computed apart, so that it is rounded once.
    const Floats at = gradient(load(logits + target, 1), all(dloss * (1.0f - p.smoothing)));
    for_vectors(0, p.cols, [&](int64_t i, auto n) {
        store_at(logits + i, gradient(load_at(logits + i, n), Floats{}), n);
    });
    store(logits + target, at, 1);
}

template <class T, bool kCapped>
void row(const CrossEntropy& p, int64_t i) {
    T* logits = static_cast<T*>(p.logits) + i * p.stride;
    const int64_t target = p.targets[i];
    const bool counts = target != p.ignore_index, known = target >= 0 && target < p.cols;
    float highest = largest(logits, p.cols);
    if (kCapped) highest = p.softcap * std::tanh(highest / p.softcap);
    const Sums sums = sums_of<T, kCapped>(logits, p.cols, highest, p.softcap, p.smoothing > 0.0f);
    const double lse = highest + std::log(sums.exps);
    if (p.lse != nullptr) p.lse[i] = static_cast<float>(lse);
    if (p.losses != nullptr) {
        double loss = 0.0;
        if (counts && known) {
            Floats slope;
            const float at = capped<kCapped>(load(logits + target, 1), p.softcap, slope)[0];
            loss = (1.0f - p.smoothing) * (lse - at) + p.z_loss * lse * lse;
            if (p.smoothing > 0.0f) loss += p.smoothing * (lse - sums.logits / p.cols);
        } else if (counts) {
            loss = std::numeric_limits<double>::quiet_NaN();
        }
        p.losses[i] = static_cast<float>(loss);
    }
    if (p.dloss == nullptr) return;
    if (counts && known) {
        const double scale = p.dloss[i] * (1.0 + 2.0 * p.z_loss * lse) / sums.exps;
        differentiate<T, kCapped>(p, logits, highest, static_cast<float>(scale), p.dloss[i],
                                  target);
    } else {
        std::fill_n(logits, p.cols, T{});
    }
}

template <class T>
void rows(const CrossEntropy& p, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
        p.softcap > 0.0f ? row<T, true>(p, i) : row<T, false>(p, i);
}

}  // namespace

void cross_entropy(const CrossEntropy& p, int64_t first, int64_t last) {
    switch (p.dtype) {
        case DType::float32: return rows<float>(p, first, last);
        case DType::bfloat16: return rows<bf16>(p, first, last);
        case DType::float16: return rows<fp16>(p, first, last);
    }
}

}  // namespace gk::cpu::GK_ISA
