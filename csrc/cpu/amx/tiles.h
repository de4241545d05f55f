// AMX's tiles. Intel's intrinsics for them stand in csrc/cpu/amx alone.
#pragma once

#include <immintrin.h>

#include "cpu/vec.h"

namespace gk::cpu::GK_ISA {

// Gives a thread eight tiles of 16 rows of 64 bytes, as long as it lives.
struct Tiles {
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, zero[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } shapes;
        for (int i = 0; i < 8; ++i) {
            shapes.bytes[i] = 64;
            shapes.rows[i] = 16;
        }
        asm volatile("" : : "m"(shapes) : "memory");  // GCC sees eight bytes of them being read
        _tile_loadconfig(&shapes);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
};

}  // namespace gk::cpu::GK_ISA
