#include "plan.h"

#include "launch.h"

namespace gk {
namespace {

thread_local Plan* current_plan = nullptr;

}  // namespace

Plan::Plan(int capability, int multiprocessors)
    : capability(capability), multiprocessors(multiprocessors) {
    if (current_plan != nullptr) throw Error("this thread makes a plan already");
    current_plan = this;
}

Plan::~Plan() { current_plan = nullptr; }

Plan* Plan::current() { return current_plan; }

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
    return true;
}

}  // namespace gk
