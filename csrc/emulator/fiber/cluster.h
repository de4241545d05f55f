// Twins of the operations that a cluster's CTAs do together (device/cluster.h), for the emulator.
#pragma once

#include "emulator/emulator.h"

namespace gk::emulator {

unsigned cluster_rank();
void cluster_arrive();
void cluster_wait();
void cluster_sync();
void* cluster_map(const void* mine, unsigned rank);

}  // namespace gk::emulator
