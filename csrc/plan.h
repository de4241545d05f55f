// What launchers would launch on some machine, without launching it and without that machine: for
// `gptkernels info --explain` and for predictions.
//
// While a thread has a Plan, `launch` writes into it what it was asked to launch, `capability` and
// `multiprocessors` are those of the machine planned for, and tensor maps are left empty. Launchers
// know nothing of it: what is planned is what would run. Addresses need not lead anywhere.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "candidate.h"

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
    // Of the calling thread, until it is destroyed. Throws Error where there is one already.
    Plan(int capability, int multiprocessors);
    ~Plan();
    Plan(const Plan&) = delete;
    Plan& operator=(const Plan&) = delete;

    // The calling thread's, or null.
    static Plan* current();

    const int capability, multiprocessors;
    std::vector<Planned> launches;
    std::vector<Refusal> refusals;
};

// For launchers: a kernel made for this device cannot take this problem. Kept by a plan alone.
void plan_refused(const char* kernel, const std::string& reason);

}  // namespace gk
