// The warp's matrix instructions, lane by lane. Layouts: PTX ISA, "Warp-level matrix load
// instruction: ldmatrix", "Warp-level matrix store instruction: stmatrix" and "Matrix Fragments for
// mma.m16n8k16 with floating point type".
#include "emulator/mma/mma.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "runtime/launch.h"
#include "emulator/fiber/grid.h"
#include "emulator/memory/memory.h"

namespace gk::emulator {

namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

struct LdmatrixLane {
    uint16_t row[8];  // row lane % 8 of matrix lane / 8
    uint32_t* r;      // [4], one register of each matrix
};

uint32_t pair(uint16_t low, uint16_t high) { return low | uint32_t(high) << 16; }

void combine_ldmatrix(void* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
        auto& mine = *static_cast<LdmatrixLane*>(lanes[lane]);
        for (int matrix = 0; matrix < 4; ++matrix) {
            const uint16_t* row = static_cast<LdmatrixLane*>(lanes[8 * matrix + lane / 4])->row;
            mine.r[matrix] = pair(row[lane % 4 * 2], row[lane % 4 * 2 + 1]);
        }
    }
}

void combine_ldmatrix_trans(void* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
        auto& mine = *static_cast<LdmatrixLane*>(lanes[lane]);
        for (int matrix = 0; matrix < 4; ++matrix) {
            const int first = 8 * matrix + lane % 4 * 2;
            mine.r[matrix] = pair(static_cast<LdmatrixLane*>(lanes[first])->row[lane / 4],
                                  static_cast<LdmatrixLane*>(lanes[first + 1])->row[lane / 4]);
        }
    }
}

void check_row(const char* what, const char* does, const void* row) {
    const auto address = reinterpret_cast<uintptr_t>(row);
    const auto arena = reinterpret_cast<uintptr_t>(shared_memory());
    if (address % 16 != 0) {
        fail(std::string(what) + does + " a row that is not aligned to 16 bytes");
    }
    if (address < arena || address >= arena + launched->shared_bytes) {
        fail(std::string(what) + does + " a row that is not in shared memory");
    }
}

void ldmatrix(const char* what, uint32_t (&r)[4], const void* row, Combine combine,
              const void* pc) {
    check_row(what, " reads", row);
    memory::read(row, 16, pc);
    LdmatrixLane lane;
    std::memcpy(lane.row, row, 16);
    lane.r = r;
    collective(what, kAllLanes, &lane, combine, true);
}

struct StmatrixLane {
    const uint32_t* r;  // [4], one register of each matrix
    uint16_t row[8];    // row lane % 8 of matrix lane / 8
};

void combine_stmatrix(void* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
        auto& mine = *static_cast<StmatrixLane*>(lanes[lane]);
        for (int column = 0; column < 8; ++column) {
            const int from = lane % 8 * 4 + column / 2;
            const uint32_t bits = static_cast<StmatrixLane*>(lanes[from])->r[lane / 8];
            mine.row[column] = uint16_t(bits >> 16 * (column % 2));
        }
    }
}

void combine_stmatrix_trans(void* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
        auto& mine = *static_cast<StmatrixLane*>(lanes[lane]);
        for (int column = 0; column < 8; ++column) {
            const int from = column * 4 + lane % 8 / 2;
            const uint32_t bits = static_cast<StmatrixLane*>(lanes[from])->r[lane / 8];
            mine.row[column] = uint16_t(bits >> 16 * (lane % 2));
        }
    }
}

void stmatrix(const char* what, void* row, const uint32_t (&r)[4], Combine combine,
              const void* pc) {
    need_hopper(what);
    check_row(what, " writes", row);
    StmatrixLane lane{r, {}};
    collective(what, kAllLanes, &lane, combine, true);
    memory::write(row, 16, pc);
    std::memcpy(row, lane.row, 16);
}

struct MmaLane {
    float* acc;         // [4]
    const uint32_t* a;  // [4]
    const uint32_t* b;  // [2]
};

float number(uint16_t bits, __nv_bfloat16) { return __uint_as_float(uint32_t(bits) << 16); }

float number(uint16_t bits, __half) { return __half2float(__half(__half_raw{bits})); }

template <class T>
void combine_mma(void* const* lanes) {
    float a[16][16], b[8][16];  // A[m][k], B[k][n] as b[n][k]
    for (int lane = 0; lane < 32; ++lane) {
        const auto& mine = *static_cast<MmaLane*>(lanes[lane]);
        const int group = lane / 4, column = lane % 4 * 2;
        for (int i = 0; i < 2; ++i) {  // of a register's two elements
            for (int r = 0; r < 4; ++r) {
                a[group + r % 2 * 8][column + r / 2 * 8 + i] =
                    number(uint16_t(mine.a[r] >> 16 * i), T());
            }
            for (int r = 0; r < 2; ++r) {
                b[group][column + r * 8 + i] = number(uint16_t(mine.b[r] >> 16 * i), T());
            }
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        float* acc = static_cast<MmaLane*>(lanes[lane])->acc;
        for (int i = 0; i < 4; ++i) {
            const float* row = a[lane / 4 + i / 2 * 8];
            const float* col = b[lane % 4 * 2 + i % 2];
            for (int k = 0; k < 16; ++k) acc[i] += row[k] * col[k];
        }
    }
}

}  // namespace

void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    ldmatrix("ldmatrix", r, row, combine_ldmatrix, __builtin_return_address(0));
}

void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    ldmatrix("ldmatrix.trans", r, row, combine_ldmatrix_trans, __builtin_return_address(0));
}

void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
    stmatrix("stmatrix", row, r, combine_stmatrix, __builtin_return_address(0));
}

void stmatrix_x4_trans(void* row, const uint32_t (&r)[4]) {
    stmatrix("stmatrix.trans", row, r, combine_stmatrix_trans, __builtin_return_address(0));
}

void mma_m16n8k16_bf16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    MmaLane lane{acc, a, b};
    collective("mma.sync", kAllLanes, &lane, combine_mma<__nv_bfloat16>, true);
}

void mma_m16n8k16_f16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    MmaLane lane{acc, a, b};
    collective("mma.sync", kAllLanes, &lane, combine_mma<__half>, true);
}

}  // namespace gk::emulator
