// Where a thread stands in a ring of stages whose mbarriers it waits on.
//
// Each stage has two barriers: producers complete `full` when they have filled it, consumers
// complete `empty` when they have used it. Consumers wait for full[stage] with parity `phase`,
// producers for empty[stage] with parity `phase ^ 1`, so that in the first round every stage counts
// as empty (device/mbarrier.h).
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
