// The mean and the variance of a row in one pass, by the formula of Chan, Golub and LeVeque,
// "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979. Each lane has
// statistics of its own. Only differences are added up and squared, and what a mean loses by
// rounding is kept beside it, so a large mean costs no digits.
#pragma once

#include "cpu/vec.h"

namespace gk::cpu::GK_ISA {

struct Moments {
    float mean, variance;
};

class Statistics {
  public:
    // get(j, n) returns the row's vector from column j on, of n numbers. `first` is a multiple of
    // kWidth.
    template <class Get>
    __attribute__((always_inline)) void take(int64_t first, int64_t last, Get&& get) {
        int64_t j = first;
        for (; j + kChunk * kWidth <= last; j += kChunk * kWidth) {
            Floats chunk[kChunk];
            for (int i = 0; i < kChunk; ++i) chunk[i] = get(j + i * kWidth, Whole());
            add(chunk);
        }
        for (; j + kWidth <= last; j += kWidth) add({get(j, Whole())});
        if (j < last) {
            rest_ = static_cast<int>(last - j);
            const Statistics before = *this;
            add({get(j, rest_)});
            mean_ = first_lanes(mean_, rest_, before.mean_);
            low_ = first_lanes(low_, rest_, before.low_);
            squares_ = first_lanes(squares_, rest_, before.squares_);
            count_ = before.count_;
        }
    }

    // The sums are over the lanes' differences from the first one's mean, which is never the 0 of
    // an empty lane.
    Moments moments() const {
        const Floats counts = first_lanes(all(1), rest_) + count_;
        const float total = kWidth * count_ + static_cast<float>(rest_);
        const Floats off = (mean_ - mean_[0]) + low_;
        const float mean_off = sum_of_lanes(off * counts) / total;
        const Floats difference = off - mean_off;
        return {mean_[0] + mean_off,
                sum_of_lanes(multiply_add(difference * counts, difference, squares_)) / total};
    }

  private:
    static constexpr int kChunk = 8;

    // Each lane gets the N numbers that it has in the vectors.
    template <int N>
    __attribute__((always_inline)) void add(const Floats (&vectors)[N]) {
        const Floats first = vectors[0];
        Floats off{}, squares{};  // off: of these vectors' mean from the first one
        for (int i = 1; i < N; ++i) off += vectors[i] - first;
        off *= 1.0f / N;
        for (int i = 0; i < N; ++i) {
            const Floats difference = (vectors[i] - first) - off;
            squares = multiply_add(difference, difference, squares);
        }
        if (count_ == 0) {
            mean_ = first;
            low_ = off;
            squares_ = squares;
        } else {
            const float share = N / (count_ + N);
            const Floats gap = ((first - mean_) + off) - low_, step = gap * share;
            const Floats next = mean_ + step;
            low_ += step - (next - mean_);
            mean_ = next;
            squares_ += multiply_add(gap * (count_ * share), gap, squares);
        }
        count_ += N;
    }

    Floats mean_{}, low_{}, squares_{};  // a lane's mean is mean_ + low_
    float count_ = 0;  // numbers of each lane
    int rest_ = 0;     // lanes that have one more
};

}  // namespace gk::cpu::GK_ISA
