// Twins of the counters that order CTAs (device/semaphore.h), for the emulator.
#pragma once

#include "emulator/emulator.h"

namespace gk::emulator {

void semaphore_wait(const int* flag, int value);
void semaphore_release(int* flag, int add);

}  // namespace gk::emulator
