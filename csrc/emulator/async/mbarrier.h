// Twins of the barriers in shared memory (device/mbarrier.h), for the emulator.
#pragma once

#include <cstdint>

#include "emulator/emulator.h"

namespace gk::emulator {

void mbarrier_init(uint64_t* bar, unsigned count);
void mbarrier_init_fence();
void mbarrier_arrive(uint64_t* bar);
void mbarrier_arrive_expect_tx(uint64_t* bar, unsigned bytes);
void mbarrier_expect_tx(uint64_t* bar, unsigned bytes);
void mbarrier_arrive_cluster(uint64_t* bar, unsigned rank);
void mbarrier_wait(uint64_t* bar, unsigned parity);

}  // namespace gk::emulator
