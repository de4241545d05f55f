// A build: one way in which a kernel for Hopper is compiled or laid out. Every op with such kernels
// has a table of them. What is said of a build is for `gptkernels info --explain`, for tuning,
// which times all of them, and for predictions; choose.h has how one of them is chosen.
#pragma once

#include <array>
#include <cstddef>
#include <type_traits>
#include <utility>

namespace gk {

// The calls for which an op's rule may choose a build. Options are what attention adds to its
// scores.
enum class Rule { never, plain, options, always };

struct Build {
    const char* name;     // unique within its op: "128x128, 2 consumers, ping-pong"
    int head_width;       // largest that it takes; 0: no attention
    int tile_m, tile_n;   // of the output: rows, columns; attention: queries, keys
    int tile_k;           // of the sum: a slice in flight; 0 where it is all there at once
    int stages;           // slices in flight
    int consumers;        // warpgroups that multiply; 0: every warp loads and multiplies
    int cluster;          // CTAs of a cluster
    bool pingpong;        // consumers take turns at the tensor cores
    unsigned threads;     // of a CTA
    size_t shared_bytes;  // of a CTA
    Rule rule;
};

// The table {of(0), of(1), ...} of kCount builds; `of` takes std::integral_constant<int, kNumber>.
template <int kCount, class Of>
constexpr std::array<Build, kCount> build_table(Of of) {
    return [&]<int... kNumbers>(std::integer_sequence<int, kNumbers...>) {
        return std::array<Build, kCount>{of(std::integral_constant<int, kNumbers>{})...};
    }(std::make_integer_sequence<int, kCount>{});
}

// f(std::integral_constant<int, kNumber>{}) for the kNumber, below kCount, that equals `number`.
template <int kCount, int kNumber = 0, class F>
void with_number(int number, F&& f) {
    if constexpr (kNumber < kCount) {
        if (number == kNumber) return f(std::integral_constant<int, kNumber>{});
        with_number<kCount, kNumber + 1>(number, f);
    }
}

}  // namespace gk
