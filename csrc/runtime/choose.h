// Which build runs: the build that was asked for, if it can run, or the build that the op's rule
// chooses.
#pragma once

#include <span>
#include <string>

#include "runtime/build.h"
#include "runtime/launch.h"
#include "runtime/shape.h"

namespace gk {

constexpr int kRule = -1;    // for the `build` of a launcher: the rule chooses
constexpr int kAnyGpu = -1;  // for Choice::build: the kernel for any GPU runs

struct Choice {
    int build = kAnyGpu;      // its number
    std::string reason = {};  // why a Hopper GPU runs no build; "" where it does, and on other GPUs
};

// A build is compiled in every 16-bit dtype for the calls for which the rule may choose it. For
// calls without options it is always compiled in bf16, so that tuning can compare it.
constexpr bool rule_may_choose(Rule rule, bool options) {
    return rule == Rule::always || rule == (options ? Rule::options : Rule::plain);
}
constexpr bool is_compiled(Rule rule, DType dtype, bool options) {
    return rule_may_choose(rule, options) || (dtype == DType::bf16 && !options);
}

// Returns why a build cannot take a call, or "" if it can. width: that of the kernels for the
// call's heads; 0: not attention.
std::string build_refuses(const Build& build, DType dtype, bool options = false, int width = 0);

// Returns why there is no build of this number, or "" if there is one.
std::string number_refuses(std::span<const Build> builds, int number);

// Throws Error: the build that was asked for cannot run.
[[noreturn]] void refuse_build(const char* kernel, const std::string& shape, int number,
                               const std::string& reason);

// `build` is a number in the table, or kRule. The callables:
//     refuses()               why no build can take the problem, "" if some can
//     refuses_build(number)   why this build cannot, "" if it can
//     by_rule()               the rule's Choice, where refuses() is ""
// Throws Error with the reason where a build is asked for that cannot run.
template <class Problem, class Refuses, class RefusesBuild, class ByRule>
Choice choose(const char* kernel, std::span<const Build> builds, const Problem& problem, int build,
              int device, Refuses&& refuses, RefusesBuild&& refuses_build, ByRule&& by_rule) {
    const bool hopper = capability(device) == 90;
    if (build < 0 && !hopper) return {};
    std::string reason = hopper ? refuses() : "it is for compute capability 9.0 alone";
    if (build < 0) return reason.empty() ? by_rule() : Choice{kAnyGpu, reason};
    if (reason.empty()) reason = number_refuses(builds, build);
    if (reason.empty()) reason = refuses_build(build);
    if (reason.empty()) return {build};
    refuse_build(kernel, shape_of(problem), build, reason);
}

}  // namespace gk
