#include "runtime/dry_run.h"

#include "runtime/launch.h"

namespace gk {
namespace {

thread_local Plan* current_plan = nullptr;

void begin(Plan* plan) {
    if (current_plan != nullptr) throw Error("this thread makes a plan already");
    current_plan = plan;
}

}  // namespace

Plan::Plan() { begin(this); }

Plan::Plan(int capability, int multiprocessors)
    : capability(capability), multiprocessors(multiprocessors) {
    begin(this);
}

Plan::~Plan() { current_plan = nullptr; }

Plan* Plan::current() { return current_plan; }

const Plan* Plan::elsewhere() {
    return current_plan != nullptr && current_plan->multiprocessors > 0 ? current_plan : nullptr;
}

void plan_refused(const char* kernel, const std::string& reason) {
    if (Plan* plan = Plan::current()) plan->refusals.push_back({kernel, reason});
}

bool detail::planned(const Launch& launch) {
    Plan* plan = Plan::current();
    if (plan == nullptr) return false;
    plan->launches.push_back({launch.name,
                              launch.shape,
                              {launch.grid.x, launch.grid.y, launch.grid.z},
                              launch.threads,
                              launch.cluster,
                              launch.shared_bytes,
                              launch.tiles,
                              launch.built});
    return Plan::elsewhere() != nullptr;
}

}  // namespace gk
