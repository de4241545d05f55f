// The fence between ordinary stores to shared memory and the asynchronous engine's reads.
#include "grid.h"
#include "tma.h"

namespace gk::emulator {

void fence_proxy_async() { fence_proxy(*running); }

}  // namespace gk::emulator
