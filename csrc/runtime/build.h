// One way in which a kernel is built: what a launcher may choose among, and what tuning times.
//
// An op with several offers `std::vector<Build> <op>_builds()`; its launcher takes an index
// into that list, or -1 for the choice of its own rule, and throws Error with the reason where a
// build cannot take a problem.
#pragma once

#include <cstddef>

namespace gk {

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
};

}  // namespace gk
