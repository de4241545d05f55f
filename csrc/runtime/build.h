// A build is a kernel for Hopper with one set of tiles and roles. Every op with such kernels has a
// table of its builds. `gptkernels info --explain` shows the members of a build, tuning times all
// builds, and predictions read the tables; runtime/choose.h says how one build is chosen.
#pragma once

#include <array>
#include <cstddef>
#include <type_traits>
#include <utility>

namespace gk {

// The calls for which an op's rule may choose a build. Options are softcap and ALiBi; attention
// forward counts a scale that is not positive as one too.
enum class Rule { never, plain, options, always };

struct Build {
    const char* name;     // unique within its op: "128x128, 2 consumers, ping-pong"
    int head_width;       // the widest head that it takes; 0: not attention
    int tile_m, tile_n;   // of the output: rows, columns; attention: queries, keys
    int tile_k;           // of the sum: the slice of a stage; 0: the sum is not sliced
    int stages;           // slices in flight
    int consumers;        // warpgroups that multiply; 0: every warp loads and computes
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

// Calls f(std::integral_constant<int, kNumber>{}) for the kNumber below kCount that equals
// `number`.
template <int kCount, int kNumber = 0, class F>
void with_number(int number, F&& f) {
    if constexpr (kNumber < kCount) {
        if (number == kNumber) return f(std::integral_constant<int, kNumber>{});
        with_number<kCount, kNumber + 1>(number, f);
    }
}

}  // namespace gk
