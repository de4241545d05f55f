#include "runtime/dry_run.h"

#include "runtime/launch.h"

namespace gk {
namespace {

thread_local DryRun* current_run = nullptr;

void begin(DryRun* run) {
    if (current_run != nullptr) throw Error("this thread makes a dry run already");
    current_run = run;
}

}  // namespace

DryRun::DryRun() { begin(this); }

DryRun::DryRun(int capability, int multiprocessors)
    : capability(capability), multiprocessors(multiprocessors) {
    begin(this);
}

DryRun::~DryRun() { current_run = nullptr; }

DryRun* DryRun::current() { return current_run; }

const DryRun* DryRun::elsewhere() {
    return current_run != nullptr && current_run->multiprocessors > 0 ? current_run : nullptr;
}

void dry_run_refused(const char* kernel, const std::string& reason) {
    if (reason.empty()) return;
    if (DryRun* run = DryRun::current()) run->refusals.push_back({kernel, reason});
}

bool detail::dry(const Launch& launch) {
    DryRun* run = DryRun::current();
    if (run == nullptr) return false;
    run->launches.push_back({launch.name,
                             launch.shape,
                             {launch.grid.x, launch.grid.y, launch.grid.z},
                             launch.threads,
                             launch.cluster,
                             launch.shared_bytes,
                             launch.tiles,
                             launch.built,
                             launch.clocks});
    return DryRun::elsewhere() != nullptr;
}

}  // namespace gk
