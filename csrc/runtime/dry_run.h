// What launchers launch, or would launch on a machine that is not there: for `gptkernels verify`,
// `gptkernels info --explain` and for predictions.
//
// While a thread has a Plan, `launch` writes into it what it is asked to launch. A plan for some
// machine is all that comes of it: `capability` and `multiprocessors` are that machine's, tensor maps
// are left empty and addresses need not lead anywhere. Launchers know nothing of it, so what is
// planned is what would run.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/build.h"

namespace gk {

// One launch; Launch in launch.h says what the members mean.
struct Planned {
    std::string kernel, shape;
    unsigned grid[3];
    unsigned threads, cluster;
    size_t shared_bytes;
    int64_t tiles;
    Candidate built;
};

// A kernel that was not chosen, and why.
struct Refusal {
    std::string kernel, reason;
};

class Plan {
  public:
    // The calling thread's, until it is destroyed. Throws Error where there is one already.
    Plan();                                     // launches happen as ever, and are written down
    Plan(int capability, int multiprocessors);  // for such a machine: nothing is launched
    ~Plan();
    Plan(const Plan&) = delete;
    Plan& operator=(const Plan&) = delete;

    // The calling thread's, or null.
    static Plan* current();
    // Likewise, if it is for a machine of its own.
    static const Plan* elsewhere();

    const int capability = 0, multiprocessors = 0;
    std::vector<Planned> launches;
    std::vector<Refusal> refusals;
};

// For launchers: a kernel made for this device cannot take this problem. Kept by a plan alone.
void plan_refused(const char* kernel, const std::string& reason);

}  // namespace gk
