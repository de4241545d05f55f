// Small kernels for tests/emulated.py, which finds them by name. `broken` makes what a kernel
// is there to do wrong; without it the same kernel is right.
#pragma once

#include "runtime/launch.h"

struct Case {
    float* a;  // what they point to, each kernel says
    float* b;
    void* c;
    int n;
    int broken;
};

struct NamedCase {
    const char* name;
    void (*kernel)(const Case);
};

// Of each .cu file, ended by a null name.
extern const NamedCase kMemoryCases[], kRaceCases[], kCopyCases[], kMeetingCases[],
    kPrimitiveCases[], kTileCases[], kDropoutCases[], kWgmmaCases[], kMbarrierCases[],
    kClusterCases[];
