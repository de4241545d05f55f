// Twins of the asynchronous copies (device/cp_async.h), for the emulator.
#pragma once

#include "emulator/emulator.h"

namespace gk::emulator {

void cp_async_16(void* shared, const void* global, int bytes);
void cp_async_commit();
void cp_async_wait(int pending);

}  // namespace gk::emulator
