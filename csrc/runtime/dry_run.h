// What launchers launch, or would launch on a machine that is not there: for `gptkernels verify`,
// `gptkernels info --explain` and for predictions.
//
// While a thread has a DryRun, `launch` writes into it what it is asked to launch. In a dry run for
// another machine that is all that happens: `capability` and `multiprocessors` are that machine's,
// tensor maps are left empty, and pointers may point anywhere. Launchers do not know of it, so a
// dry run says what would really run.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/build.h"

namespace gk {

// One launch; Launch in launch.h says what the members mean.
struct DryLaunch {
    std::string kernel, shape;
    unsigned grid[3];
    unsigned threads, cluster;
    size_t shared_bytes;
    int64_t tiles;
    Build built;
    double clocks;
};

// A kernel that was not chosen, and why.
struct Refusal {
    std::string kernel, reason;
};

class DryRun {
  public:
    // Starts a dry run of the calling thread, which lasts as long as the object. Throws Error where
    // the thread makes one already.
    DryRun();                                     // kernels are launched as usual, and recorded
    DryRun(int capability, int multiprocessors);  // for such a machine: kernels are recorded alone
    ~DryRun();
    DryRun(const DryRun&) = delete;
    DryRun& operator=(const DryRun&) = delete;

    // The dry run of the calling thread, or null.
    static DryRun* current();
    // The same, but null too where it is not for another machine.
    static const DryRun* elsewhere();

    const int capability = 0, multiprocessors = 0;
    std::vector<DryLaunch> launches;
    std::vector<Refusal> refusals;
};

// For launchers: a kernel made for this GPU does not take this problem. Does nothing for the reason
// "", or where the thread makes no dry run.
void dry_run_refused(const char* kernel, const std::string& reason);

}  // namespace gk
