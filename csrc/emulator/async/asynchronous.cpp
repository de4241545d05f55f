#include "emulator/async/asynchronous.h"

#include <cstdlib>
#include <deque>
#include <string>
#include <utility>

#include "runtime/launch.h"

namespace gk::emulator {
namespace {

bool early = false;
std::deque<std::function<void()>> pending;

}  // namespace

void choose_copies() {
    const char* name = std::getenv("GPTKERNELS_EMULATE_COPIES");
    const std::string given = name ? name : "late";
    if (given != "late" && given != "early") {
        throw Error("GPTKERNELS_EMULATE_COPIES must be late or early, got " + given);
    }
    early = given == "early";
}

bool copies_early() { return early; }

void later(std::function<void()> work) {
    if (early) {
        work();
    } else {
        pending.push_back(std::move(work));
    }
}

size_t engine_pending() { return pending.size(); }

void engine_run(size_t which) {
    const auto work = std::move(pending[which]);
    pending.erase(pending.begin() + ptrdiff_t(which));
    work();
}

void engine_forget() { pending.clear(); }

}  // namespace gk::emulator
