// How the kernels of LayerNorm's backward pass hold a row and process many rows; formulas, shapes
// and bytes are in layer_norm/params.h.
//
// The CTAs, or clusters of them, are persistent: each takes rows in turn. It keeps a row in
// registers between its two passes (the sums over the row, then its gradients), and adds up its
// share of dweight and dbias over all its rows in registers too. The weight is also in registers
// where there are enough. While a CTA works on one row, the next row is copied to shared memory.
// Every thread copies the elements that it will read itself, so that no thread waits for another.
#pragma once

#include <algorithm>

#include "device/cp_async.h"
#include "device/reduce.h"
#include "layer_norm/row.h"

namespace gk {

struct Bwd {
    LayerNormBwd op;
    Divisor cols;
    int warps;  // warps of one CTA that share a row
    int ctas;   // CTAs that share a row
};

// Adds up the shares of dweight and dbias; defined in layer_norm/bwd.cu.
void launch_layer_norm_bwd_reduce(const LayerNormBwd& op, Stream stream);

// Where a thread finds the weight of its columns: in registers, for all rows; in its own pieces of
// shared memory, where registers are short; or in the weight tensor itself.
enum class Weight { registers, shared, global };

// Whether a thread with this many groups of an aligned row has no registers for the weight. With
// few groups it has registers to spare; with the most groups its SM runs fewer threads.
constexpr bool kSharedWeight[] = {false, false, true, true, false};

// One thread's part of a row, or of a chunk of it: kGroups groups from group `first` on; first is 0
// unless the weight is global. kThreads: the most threads that a CTA has, so that the distance
// between a thread's pieces is known.
template <class X, class S, int kGroups, bool kAligned, Weight kWeight, int kThreads>
struct BwdPart {
    const LayerNormBwd& op;
    Team team;
    DropoutKey key;
    int64_t row;
    int cols;  // 0 for a row past the last one
    float mean, rstd;
    Pack<X, kGroup> dy[kGroups];
    Pack<S, kGroup> s[kGroups];
    float weight[kWeight == Weight::registers ? kGroups : 1][kGroup];
    float* shared_weight;

    __device__ __forceinline__ void start(unsigned char* shared) {
        if (op.dropout.rng != nullptr) key = dropout_key(op.dropout);
        shared_weight = reinterpret_cast<float*>(shared) + 4 * threadIdx.x;
        if constexpr (kWeight != Weight::global) {
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
                float(&loaded)[kGroup] = weight[kWeight == Weight::registers ? g : 0];
                load_floats<kAligned>(loaded, op.weight, op.weight_dtype, team.col(g), op.cols);
                if constexpr (kWeight == Weight::shared) {
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        st128_shared(weight_piece(2 * g + i),
                                     Pack<float, 4>{{loaded[4 * i], loaded[4 * i + 1],
                                                     loaded[4 * i + 2], loaded[4 * i + 3]}});
                }
            }
        }
    }

    __device__ __forceinline__ float* weight_piece(int number) const {
        return shared_weight + 4 * number * kThreads;
    }

    // All calls from here on are about this row.
    __device__ __forceinline__ void take(int64_t index, float2 statistics) {
        row = index;
        cols = row < op.rows ? op.cols : 0;
        mean = statistics.x;
        rstd = statistics.y;
    }

    // mean and rstd of a row; zeros past the last row.
    __device__ __forceinline__ float2 statistics_of(int64_t index) const {
        return index < op.rows ? make_float2(op.mean[index], op.rstd[index]) : float2{};
    }

    __device__ __forceinline__ const X* dy_of(int64_t index) const {
        return static_cast<const X*>(op.dy) + index * op.cols;
    }
    __device__ __forceinline__ const S* s_of(int64_t index) const {
        return static_cast<const S*>(op.sum) + index * op.sum_stride;
    }
    __device__ __forceinline__ const S* dsum_of(int64_t index) const {
        return static_cast<const S*>(op.dsum) + index * op.cols;
    }

    // Loads a row. All its loads are in flight together.
    __device__ __forceinline__ void load(int first) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            dy[g] = load_group<kAligned>(dy_of(row), team.col(first + g), cols);
            s[g] = load_group<kAligned>(s_of(row), team.col(first + g), cols);
        }
    }

    __device__ __forceinline__ Pack<S, kGroup> load_dsum(int group) const {
        return load_group<kAligned>(dsum_of(row), team.col(group), cols);
    }

    // Computes dy, g = dy weight and x^.
    __device__ __forceinline__ void expand(int first, int index, float (&gradient)[kGroup],
                                           float (&g)[kGroup], float (&normalised)[kGroup]) const {
        float loaded[kGroup];
        if constexpr (kWeight == Weight::global) {
            load_floats<kAligned>(loaded, op.weight, op.weight_dtype, team.col(first + index),
                                  op.cols);
        } else if constexpr (kWeight == Weight::shared) {
#pragma unroll
            for (int i = 0; i < kGroup; ++i)
                loaded[i] = ld128(weight_piece(2 * index + i / 4)).at[i % 4];
        }
        unpack_floats(gradient, dy[index]);
        unpack_floats(normalised, s[index]);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
            g[j] = gradient[j] * (kWeight == Weight::registers ? weight[index][j] : loaded[j]);
            normalised[j] = (normalised[j] - mean) * rstd;
        }
    }

    // The sums of g and of g x^. Columns past the end of the row have dy = 0. add(index, dy, x^)
    // adds what the row contributes to dweight and dbias.
    template <class Add>
    __device__ __forceinline__ float2 sums(int first, const Add& add) const {
        float2 sums = make_float2(0.0f, 0.0f);
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            float gradient[kGroup], g[kGroup], normalised[kGroup];
            expand(first, i, gradient, g, normalised);
            add(i, gradient, normalised);
            sums.x += group_sum(g);
            sums.y += group_dot(g, normalised);
        }
        return sums;
    }

    // Between the passes: keeps the compiler from holding unpacked values in registers.
    __device__ __forceinline__ void forget_values() {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            forget(dy[g]);
            forget(s[g]);
        }
    }

    // Stores the gradient of s, including dsum, which arrives through s itself: for the residual
    // and, after dropout, for x. dsum(index) returns the loaded group of dsum.
    template <class Dsum>
    __device__ __forceinline__ void store(int first, float2 means, const Dsum& dsum) const {
        const int64_t start = row * op.cols;
        X* dx_row = static_cast<X*>(op.dx) + start;
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const int col = team.col(first + i);
            if (col >= cols) break;
            float gradient[kGroup], g[kGroup], normalised[kGroup], ds[kGroup] = {};
            expand(first, i, gradient, g, normalised);
            if (op.dsum != nullptr) unpack_floats(ds, dsum(i));
#pragma unroll
            for (int j = 0; j < kGroup; ++j)
                ds[j] += rstd * (g[j] - means.x - normalised[j] * means.y);
            if (op.dresidual != nullptr)
                store_floats<kAligned>(op.dresidual, start, op.residual_dtype, col, cols, ds);
            if (op.dropout.rng != nullptr) drop(ds, start + col, key, op.dropout.scale);
            store_group<kAligned>(dx_row, col, cols, pack_floats<X>(ds));
        }
    }
};

// One thread's share of dweight and dbias.
template <int kGroups>
struct WeightGradients {
    float weight[kGroups][kGroup] = {}, bias[kGroups][kGroup] = {};

    __device__ __forceinline__ void add(int group, const float (&dy)[kGroup],
                                        const float (&normalised)[kGroup]) {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
            weight[group][j] += dy[j] * normalised[j];
            bias[group][j] += dy[j];
        }
    }
};

// Where a thread's part of the next row arrives in shared memory: dy, s and dsum in pieces of 16
// bytes. The pieces of neighbouring threads lie side by side.
template <class X, class S, int kGroups, int kThreads>
struct Ahead {
    static constexpr int kPiecesOfX = kGroups * static_cast<int>(sizeof(X)) / 2;
    static constexpr int kPiecesOfS = kGroups * static_cast<int>(sizeof(S)) / 2;

    unsigned char* mine;  // the thread's piece 0

    static constexpr size_t bytes(bool dsum) {
        return size_t(16) * kThreads * (kPiecesOfX + (dsum ? 2 : 1) * kPiecesOfS);
    }

    __device__ explicit Ahead(unsigned char* shared) : mine(shared + 16 * threadIdx.x) {}

    __device__ __forceinline__ unsigned char* piece(int number) const {
        return mine + 16 * number * kThreads;
    }

    template <class T>
    __device__ __forceinline__ void fetch(int number, const T* row, const Team& team,
                                          int cols) const {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            const int col = team.col(g);
#pragma unroll
            for (int i = 0; i < kGroup / kPer128<T>; ++i)
                cp_async_16<(sizeof(T) > 2)>(piece(number++), row + col + i * kPer128<T>,
                                             col < cols ? 16 : 0);
        }
    }

    // Group `index` of the tensor that was fetched to the pieces from `number` on.
    template <class T>
    __device__ __forceinline__ Pack<T, kGroup> read(int number, int index) const {
        constexpr int kPieces = kGroup / kPer128<T>;
        Pack<T, kGroup> pack;
#pragma unroll
        for (int i = 0; i < kPieces; ++i)
            *reinterpret_cast<Pack<T, kPer128<T>>*>(pack.at + i * kPer128<T>) =
                ld128(reinterpret_cast<const T*>(piece(number + index * kPieces + i)));
        return pack;
    }
};

// Which rows a team takes, and where its CTA or cluster stores its share of dweight and dbias.
struct Rows {
    int64_t first, step;  // of the CTA or cluster: the same for all its teams
    int teams;            // teams of a CTA; a cluster is one team
    int share;
};

// Stores a CTA's or cluster's sums of dweight or dbias. The sums of its teams are added in shared
// memory, one team after the other. shared: one float for each column that a team may hold.
template <int kGroups, bool kAligned>
__device__ __forceinline__ void store_share(float (&sums)[kGroups][kGroup], float* shares,
                                            const Team& team, const Rows& rows, int cols,
                                            float* shared) {
    for (int turn = 0; turn < rows.teams; ++turn) {
        __syncthreads();
        if (team.index != turn) continue;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
#pragma unroll
            for (int j = 0; j < kGroup; ++j) {
                float* at = shared + (g * kGroup + j) * team.threads + team.thread;
                if (turn > 0) sums[g][j] += *at;
                if (turn + 1 < rows.teams) *at = sums[g][j];
            }
            if (turn + 1 == rows.teams)
                store_group<kAligned>(shares + static_cast<int64_t>(rows.share) * cols, team.col(g),
                                      cols, pack_floats<float>(sums[g]));
        }
    }
}

// The shared memory that `gradients_of_rows` needs, in bytes.
template <class X, class S, int kThreads>
constexpr size_t bytes_of_rows(int groups, bool aligned_rows, bool dsum) {
    const size_t floats = sizeof(float) * kGroup * groups * kThreads;  // a weight, or a share
    if (!aligned_rows) return floats;
    const size_t ahead = groups * Ahead<X, S, 1, kThreads>::bytes(dsum);
    return std::max(floats, ahead) + (kSharedWeight[groups] ? floats : 0);
}

// Computes the gradients of a team's rows. total(sums, turn) returns the sums over all threads of
// the team to each of them; the turns alternate between 0 and 1.
template <class X, class S, int kGroups, bool kAligned, int kThreads, class Total>
__device__ __forceinline__ void gradients_of_rows(const Bwd& p, const Team& team, const Rows& rows,
                                                  unsigned char* shared, const Total& total) {
    const LayerNormBwd& op = p.op;
    constexpr Weight kWeight =
        kAligned && kSharedWeight[kGroups] ? Weight::shared : Weight::registers;
    BwdPart<X, S, kGroups, kAligned, kWeight, kThreads> part{op, team};
    part.start(shared);
    if constexpr (kWeight == Weight::shared) shared += sizeof(float) * kGroup * kGroups * kThreads;
    WeightGradients<kGroups> gradients;
    using Places = Ahead<X, S, kGroups, kThreads>;
    Places ahead(shared);
    constexpr int kPieceOfS = Places::kPiecesOfX, kPieceOfDsum = kPieceOfS + Places::kPiecesOfS;

    // Each row has two cp.async groups: dsum is read last, so its place is free for the next row
    // only at the end.
    const auto fetch = [&](int64_t row) {
        if constexpr (kAligned) {
            const int cols = row < op.rows ? op.cols : 0;
            ahead.fetch(0, part.dy_of(row), team, cols);
            ahead.fetch(kPieceOfS, part.s_of(row), team, cols);
            cp_async_commit();
        }
    };
    const auto fetch_dsum = [&](int64_t row) {
        if constexpr (kAligned) {
            if (op.dsum != nullptr)
                ahead.fetch(kPieceOfDsum, part.dsum_of(row), team, row < op.rows ? op.cols : 0);
            cp_async_commit();
        }
    };

    int64_t row = rows.first + team.index;
    fetch(row);
    fetch_dsum(row);
    float2 statistics = part.statistics_of(row);
    int turn = 0;
    // A team without a row takes part in the barriers, with zeros. Without the parentheses nvcc
    // takes `index <` in C++20 for the start of a template's arguments.
    for (; (row - team.index) < op.rows; row += rows.step) {
        part.take(row, statistics);
        if constexpr (kAligned) {
            cp_async_wait<1>();
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
                part.dy[g] = ahead.template read<X>(0, g);
                part.s[g] = ahead.template read<S>(kPieceOfS, g);
            }
        } else {
            part.load(0);
        }
        fetch(row + rows.step);
        statistics = part.statistics_of(row + rows.step);
        float2 sums = part.sums(0, [&](int group, auto& dy, auto& normalised) {
            gradients.add(group, dy, normalised);
        });
        // The turns alternate because the next row's sums are written while a slow warp may still
        // read these.
        sums = total(sums, turn);
        turn ^= 1;
        part.forget_values();
        cp_async_wait<1>();
        const float2 means = make_float2(divide(sums.x, p.cols), divide(sums.y, p.cols));
        part.store(0, means, [&](int group) {
            if constexpr (kAligned)
                return ahead.template read<S>(kPieceOfDsum, group);
            else
                return part.load_dsum(group);
        });
        fetch_dsum(row + rows.step);
    }
    cp_async_wait<0>();  // the copies for rows past the last one, before their memory is reused

    float* sums = reinterpret_cast<float*>(shared);
    if (op.partial_dweight != nullptr)
        store_share<kGroups, kAligned>(gradients.weight, op.partial_dweight, team, rows, op.cols,
                                       sums);
    if (op.partial_dbias != nullptr)
        store_share<kGroups, kAligned>(gradients.bias, op.partial_dbias, team, rows, op.cols, sums);
}

}  // namespace gk
