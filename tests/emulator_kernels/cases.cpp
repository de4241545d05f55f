// Launches a case by its name: what tests/test_emulator.py calls.
#include "cases.h"

#include <cstring>

#include "emulator/memory.h"

#define GK_EXPORT extern "C" __attribute__((visibility("default")))

GK_EXPORT void declare(const char* name, const void* begin, size_t bytes, int written) {
    gk::emulator::memory::declare(name, begin, bytes, written != 0);
}

GK_EXPORT void forget() { gk::emulator::memory::forget(); }

// 0, or 1 and the error's sentence.
GK_EXPORT int run(const char* name, const unsigned (&grid)[3], unsigned threads, size_t shared,
                  const Case* params, char* error, size_t error_bytes) {
    try {
        for (const NamedCase* cases :
             {kMemoryCases, kRaceCases, kCopyCases, kMeetingCases, kPrimitiveCases,
              kDropoutCases}) {
            for (; cases->name != nullptr; ++cases) {
                if (std::strcmp(cases->name, name) != 0) continue;
                gk::launch(cases->kernel,
                           {name, "a small case", dim3(grid[0], grid[1], grid[2]), threads, shared,
                            {0, nullptr}},
                           *params);
                return 0;
            }
        }
        throw gk::Error(std::string("there is no case ") + name);
    } catch (const gk::Error& caught) {
        std::strncpy(error, caught.what(), error_bytes - 1);
        return 1;
    }
}
