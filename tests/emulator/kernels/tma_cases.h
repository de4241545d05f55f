// Small kernels for tests/emulator/test_tma*.py that take tensor maps. `broken` makes what a kernel is
// there to do wrong; without it the same kernel is right.
#pragma once

#include "runtime/tensor_map.h"

struct BoxCase {
    gk::TensorMap map;
    const void* a;  // what they point to, each kernel says
    void* b;
    int at[5];  // coordinates of a box
    int bytes;  // of the box
    int n;
    int broken;
};

struct NamedBoxCase {
    const char* name;
    void (*kernel)(const BoxCase);
};

// Of each .cu file, ended by a null name.
extern const NamedBoxCase kBoxCases[], kBoxMistakes[];
