// A linear layer of few rows in bfloat16: y^T = w x^T in AMX's tiles; other dtypes and a transposed w
// are left to v4_bf16. A tile takes 16 rows of w as they lie in memory, and one of x^T has all rows of x as its
// columns. So w is read once, whatever the number of rows, and a row's bits do not depend on them.
#include "cpu/amx/tiles.h"
#include "cpu/kernels.h"
#include "cpu/transpose.h"

namespace gk::cpu {
namespace v4_bf16 {
extern const Kernels kernels;
}

namespace GK_ISA {
namespace {

constexpr int kRows = 16, kDepth = 32;  // of a tile of w
constexpr int kTogether = 4;            // sums: each waits for the one before

bool others(const Linear& p) { return p.dtype != DType::bfloat16 || p.transposed; }

// Tiles of x^T.
int64_t steps_of(const Linear& p) {
    return (p.K + kTogether * kDepth - 1) / (kTogether * kDepth) * kTogether;
}

// Numbers k ... k + 31 of a row of K numbers, 0 past them.
__m512i numbers(const bf16* row, int64_t k, int64_t K) {
    if (k >= K) return __m512i{};
    const __mmask32 there = k + kDepth <= K ? ~0u : (1u << (K - k)) - 1;
    return _mm512_maskz_loadu_epi16(there, row + k);
}

// The rows n ... n + 15 and the numbers k ... k + 31 of w. At the edges they are copied to `room`, 0
// past row last - 1 and past number K - 1.
struct Rows {
    const void* at;
    int64_t bytes;  // from one row to the next

    Rows(const Linear& p, int64_t n, int64_t last, int64_t k, __m512i (&room)[kRows])
        : at(static_cast<const bf16*>(p.w) + n * p.w_stride + k), bytes(p.w_stride * 2) {
        if (n + kRows <= last && k + kDepth <= p.K) return;
        for (int i = 0; i < kRows; ++i) {
            const bf16* row = static_cast<const bf16*>(p.w) + (n + i) * p.w_stride;
            room[i] = n + i < last ? numbers(row, k, p.K) : __m512i{};
        }
        asm volatile("" : : "m"(room) : "memory");  // the compiler does not see a tile's load
        at = room;
        bytes = 64;
    }
};

// Writes a tile of y^T, the columns n ... n + 15 of y, up to last - 1.
void put(const Linear& p, Floats (&found)[kRows], int64_t n, int64_t last) {
    transpose(found);
    const int count = static_cast<int>(last - n < kRows ? last - n : kRows);
    const bf16* b = static_cast<const bf16*>(p.b);
    const Floats added = b == nullptr ? Floats{} : load(b + n, count);
    for (int64_t r = 0; r < p.M; ++r) {
        bf16* to = static_cast<bf16*>(p.y) + r * p.N + n;
        count == kRows ? store(to, found[r] + added) : store(to, found[r] + added, count);
    }
}

}  // namespace

// x^T in tiles of 32 numbers of 16 rows: row i has the numbers 2 i and 2 i + 1 of each row of x.
int64_t linear_scratch(const Linear& p) {
    if (others(p)) return v4_bf16::kernels.linear_scratch(p);
    return steps_of(p) * kRows * 64;
}

void linear_ready(const Linear& p, void* x) {
    if (others(p)) return v4_bf16::kernels.linear_ready(p, x);
    for (int64_t step = 0; step < steps_of(p); ++step) {
        Floats square[kRows];
        for (int64_t r = 0; r < kRows; ++r)
            square[r] = r < p.M ? reinterpret_cast<Floats>(
                                      numbers(static_cast<const bf16*>(p.x) + r * p.x_stride,
                                              step * kDepth, p.K))
                                : Floats{};
        transpose(square);
        for (int i = 0; i < kRows; ++i)
            store(static_cast<float*>(x) + (step * kRows + i) * kRows, square[i]);
    }
}

void linear(const Linear& p, const void* x, int64_t first, int64_t last) {
    if (others(p)) return v4_bf16::kernels.linear(p, x, first, last);
    const Tiles session;
    const bf16* w = static_cast<const bf16*>(p.w);
    alignas(64) __m512i room[kTogether][kRows];
    alignas(64) Floats found[kTogether][kRows];
    for (int64_t n = first; n < last; n += kRows) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < p.K; k += kTogether * kDepth) {
            const int64_t next = (n + kRows) * p.w_stride + k;  // the memory that is read next
            for (int i = 0; i < kRows; ++i)
                for (int j = 0; j < kTogether; ++j)
                    __builtin_prefetch(w + next + i * p.w_stride + j * kDepth, 0, 2);
            const Rows a(p, n, last, k, room[0]), b(p, n, last, k + kDepth, room[1]),
                c(p, n, last, k + 2 * kDepth, room[2]), d(p, n, last, k + 3 * kDepth, room[3]);
            const bf16* right = static_cast<const bf16*>(x) + k * kRows;
            constexpr int kTile = kDepth * kRows;
            _tile_loadd(4, right, 64);
            _tile_stream_loadd(5, a.at, a.bytes);
            _tile_dpbf16ps(0, 5, 4);
            _tile_loadd(4, right + kTile, 64);
            _tile_stream_loadd(6, b.at, b.bytes);
            _tile_dpbf16ps(1, 6, 4);
            _tile_loadd(4, right + 2 * kTile, 64);
            _tile_stream_loadd(7, c.at, c.bytes);
            _tile_dpbf16ps(2, 7, 4);
            _tile_loadd(4, right + 3 * kTile, 64);
            _tile_stream_loadd(5, d.at, d.bytes);
            _tile_dpbf16ps(3, 5, 4);
            asm volatile("" : : : "memory");  // before the next step writes to `room`
        }
        _tile_stored(0, found[0], 64);
        _tile_stored(1, found[1], 64);
        _tile_stored(2, found[2], 64);
        _tile_stored(3, found[3], 64);
        asm volatile("" : "+m"(found) : : "memory");
        for (int i = 0; i < kRows; ++i)
            found[0][i] = (found[0][i] + found[1][i]) + (found[2][i] + found[3][i]);
        put(p, found[0], n, last);
    }
}

}  // namespace GK_ISA
}  // namespace gk::cpu
