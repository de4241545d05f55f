// Where a thread stands in a ring of stages whose mbarriers it waits on.
//
// Each stage has a `full` barrier, which those who fill it complete, and an `empty` one, which
// those who have used it complete. Consumers wait for full[stage] with parity `phase`, producers
// for empty[stage] with parity `phase ^ 1`: the first round finds every stage empty
// (device/mbarrier.h).
#pragma once

#include "runtime/launch.h"

namespace gk {

template <int kStages>
struct PipelineState {
    int stage = 0;
    unsigned phase = 0;

    __device__ void advance() {
        if (++stage == kStages) {
            stage = 0;
            phase ^= 1;
        }
    }
};

}  // namespace gk
