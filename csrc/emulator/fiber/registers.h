// Twins of the instructions that pass registers between warpgroups (device/warpgroup.h), for the
// emulator.
#pragma once

#include "emulator/emulator.h"

namespace gk::emulator {

void warpgroup_reg_alloc(unsigned registers);
void warpgroup_reg_dealloc(unsigned registers);

}  // namespace gk::emulator
