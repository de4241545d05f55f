// What launchers launch, or would launch on a machine that is not there: for `gptkernels verify`,
// `gptkernels info --explain` and predictions.
//
// While a thread has a DryRun, `launch` records in it every launch that it is asked for. In a dry
// run for another machine nothing else happens: `capability` and `multiprocessors` return that
// machine's numbers, tensor maps are left empty, and pointers may point anywhere. Launchers do not
// know of the dry run, so it says what would really run.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/build.h"

namespace gk {

// One launch. Launch in runtime/launch.h says what the members mean.
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
    // Starts a dry run of the calling thread, which lasts as long as the object. Throws Error if
    // the thread already has one.
    DryRun();                                     // kernels are launched as usual, and recorded
    DryRun(int capability, int multiprocessors);  // for such a machine: kernels are only recorded
    ~DryRun();
    DryRun(const DryRun&) = delete;
    DryRun& operator=(const DryRun&) = delete;

    // The dry run of the calling thread, or null.
    static DryRun* current();
    // The same, but null too if the dry run is not for another machine.
    static const DryRun* elsewhere();

    const int capability = 0, multiprocessors = 0;
    std::vector<DryLaunch> launches;
    std::vector<Refusal> refusals;
};

// A launcher calls this where a kernel made for this GPU does not take the problem. Does nothing if
// the reason is "" or if the thread has no dry run.
void dry_run_refused(const char* kernel, const std::string& reason);

}  // namespace gk
