// Attention's products in AMX's tiles: bf16 operands, fp32 sums. cpu/attention/product.h has the
// same functions in vectors.
//
// A tile has 16 rows of 64 bytes. TDPBF16PS adds to a tile C (16, 16) in fp32 the product of A (16,
// 32) and B, whose row i holds the rows 2i and 2i + 1 of the matrix (32, 16) number by number in
// turn: operand B lies "in pairs". All sizes are padded to multiples of 32: a product takes two
// tiles of A and two of B at a time, so that each is used twice.
#pragma once

#include "cpu/amx/tiles.h"
#include "cpu/attention/product.h"

namespace gk::cpu::GK_ISA {

struct TileProducts {
    using Element = bf16;
    using Number = bf16;
    static constexpr int kWide = 32, kKeys = 256, kQueries = 256;

    using Session = Tiles;

    struct Left {
        const bf16* at;
        int64_t stride;

        Left from(int i, int j) const { return {at + i * stride + j, stride}; }
    };
    // A matrix of `stride` columns in pairs: number (i, j) is at[i / 2 * 2 * stride + 2 j + i % 2].
    struct Right {
        const bf16* at;
        int64_t stride;

        Right from(int i) const { return {at + i * stride, stride}; }  // i is even
    };

    static int padded(int rows) { return static_cast<int>(up_to(rows, 32)); }
    static int deep(int, int width) { return width; }

    static Left left(const bf16* at) { return {at, kQueries}; }

    static Left rows(const bf16* from, int64_t stride, int n, int D, int width, bf16* room) {
        const int all_rows = padded(n);
        for (int i = 0; i < all_rows; ++i)
            for (int d = 0; d < width; d += 32)
                store_words(room + i * width + d, words(from + i * stride, i < n, d, D));
        return {room, width};
    }

    static bool transposed(const bf16* from, int64_t stride, int n, int D, int width,
                           const float* taint, bf16* room, Left& found) {
        // Pairs of rows are words, and the squares of words are transposed.
        Words most{};  // of the bits of every number but its sign
        for (int i = 0; i < padded(n); i += 32)
            for (int d = 0; d < width; d += 16) {
                Floats square[16];
                for (int pair = 0; pair < 16; ++pair) {
                    const int row = i + 2 * pair;
                    const Words even =
                        half_words(from + row * stride, good(row, n, taint), d, D);
                    const Words odd =
                        half_words(from + (row + 1) * stride, good(row + 1, n, taint), d, D);
                    most = larger_words(most, larger_words(even & 0x7fff, odd & 0x7fff));
                    square[pair] = as_floats(even | odd << 16);
                }
                transpose(square);
                for (int j = 0; j < 16; ++j)
                    store_words(room + (d + j) * kKeys + i, as_words(square[j]));
            }
        found = {room, kKeys};
        for (int lane = 0; lane < 16; ++lane)
            if (most[lane] >= 0x7f80) return false;
        return true;
    }

    static Right columns(const bf16* from, int64_t stride, int n, int D, int width,
                         const float* taint, bf16* room) {
        // A word of a row is a pair of numbers of a column.
        for (int lane = 0; lane < kLanes; lane += 16)
            for (int d = 0; d < width; d += 32) {
                Floats square[16];
                for (int i = 0; i < 16; ++i) {
                    const int row = lane + i;
                    const bool good = taint == nullptr || taint[row] == 0;
                    square[i] = good ? as_floats(words(from + row * stride, row < n, d, D))
                                     : as_floats(Words{} + 0x7fc07fc0);  // two NaNs
                }
                transpose(square);
                for (int j = 0; j < 16; ++j)
                    store_words(room + (d + 2 * j) * kLanes + 2 * lane, as_words(square[j]));
            }
        return {room, kLanes};
    }

    static void right_rows(const bf16* from, int64_t stride, int n, int D, int width,
                           const float* taint, bf16* to) {
        for (int i = 0; i < kLanes; i += 2)
            for (int d = 0; d < width; d += 16)
                store_words(to + i * width + 2 * d,
                            half_words(from + i * stride, good(i, n, taint), d, D) |
                                half_words(from + (i + 1) * stride, good(i + 1, n, taint), d, D)
                                    << 16);
    }

    static void put_right(bf16* to, int row, int vector, Floats even, Floats odd) {
        store_words(to + row * kLanes + vector * 32, in_pairs(both(even, odd)));
    }
    static void put_left(bf16* to, int row, int lane, Floats even, Floats odd) {
        store(to + row * kQueries + lane, even);
        store(to + (row + 1) * kQueries + lane, odd);
    }

    template <bool kAdd>
    static void multiply(float* c, int64_t stride, const Left& a, const Right& b, int m, int n,
                         int k) {
        // The compiler does not know that a tile is loaded from memory.
        asm volatile("" : : : "memory");
        const int64_t c_bytes = stride * 4, a_bytes = a.stride * 2, b_bytes = b.stride * 4;
        for (int j = 0; j < n; j += 32)
            for (int i = 0; i < m; i += 32) {
                float* to = c + i * stride + j;
                if (kAdd) {
                    _tile_loadd(0, to, c_bytes);
                    _tile_loadd(1, to + 16, c_bytes);
                    _tile_loadd(2, to + 16 * stride, c_bytes);
                    _tile_loadd(3, to + 16 * stride + 16, c_bytes);
                } else {
                    _tile_zero(0);
                    _tile_zero(1);
                    _tile_zero(2);
                    _tile_zero(3);
                }
                const bf16* left = a.at + i * a.stride;
                const bf16* right = b.at + 2 * j;
                for (int step = 0; step < k; step += 32) {
                    _tile_stream_loadd(4, left, a_bytes);
                    _tile_loadd(6, right, b_bytes);
                    _tile_loadd(7, right + 32, b_bytes);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_stream_loadd(5, left + 16 * a.stride, a_bytes);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                    left += 32;
                    right += 32 * b.stride;
                }
                _tile_stored(0, to, c_bytes);
                _tile_stored(1, to + 16, c_bytes);
                _tile_stored(2, to + 16 * stride, c_bytes);
                _tile_stored(3, to + 16 * stride + 16, c_bytes);
            }
        asm volatile("" : : : "memory");
    }

  private:
    static bool good(int row, int n, const float* taint) {
        return row < n && (taint == nullptr || taint[row] == 0);
    }

    static Words larger_words(Words a, Words b) {
        return reinterpret_cast<Words>(
            _mm512_max_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
    }

    static void store_words(bf16* to, Words x) { *reinterpret_cast<WordsThere*>(to) = x; }

    // Numbers d ... d + 31 of a row of D numbers, 0 past them or where there is no such row.
    static Words words(const bf16* row, bool there, int d, int D) {
        if (!there) return Words{};
        if (d + 32 <= D) return *reinterpret_cast<const WordsThere*>(row + d);
        uint16_t found[32] = {};
        for (int i = 0; d + i < D && i < 32; ++i) found[i] = row[d + i].bits;
        return *reinterpret_cast<const WordsThere*>(found);
    }
    // Numbers d ... d + 15, each in a word.
    static Words half_words(const bf16* row, bool there, int d, int D) {
        if (!there) return Words{};
        if (d + 16 <= D) return words_of(*reinterpret_cast<const HalvesThere*>(row + d));
        uint16_t found[16] = {};
        for (int i = 0; d + i < D && i < 16; ++i) found[i] = row[d + i].bits;
        return words_of(*reinterpret_cast<const HalvesThere*>(found));
    }

    // The numbers of `even` and then those of `odd` in bf16, and the same in turn.
    static __m512i both(Floats even, Floats odd) {
        return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(odd),
                                                             reinterpret_cast<__m512>(even)));
    }
    static Words in_pairs(__m512i x) {
        alignas(64) static constexpr uint16_t kFrom[32] = {
            0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31,
        };
        return reinterpret_cast<Words>(
            _mm512_permutexvar_epi16(*reinterpret_cast<const __m512i*>(kFrom), x));
    }
};

}  // namespace gk::cpu::GK_ISA
