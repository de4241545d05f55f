// The launcher of a GPT's blocks: a list of other launchers.
#include "cpu/decoder/params.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/attention/decode/params.h"
#include "cpu/gelu_mlp/params.h"
#include "cpu/layer_norm/params.h"
#include "cpu/linear/params.h"

namespace gk::cpu {
namespace {

struct Step {
    const DecoderStep& p;
    const int threads;
    const int64_t rows, size, heads_width;
    std::unique_ptr<char[]> room;
    // branch: what the next norm adds to the stream; sums: the streams of a block's two norms.
    char *y, *branch, *sums[2], *heads, *attended, *hidden;

    Step(const DecoderStep& given, int64_t F, int most)
        : p(given), threads(most), rows(p.R * p.T),
          size(static_cast<int64_t>(bytes_of(p.dtype))), heads_width((p.H + 2 * p.Hk) * p.D) {
        const int64_t of_C = rows * p.C * size;
        const int64_t bytes[] = {of_C, of_C, of_C, of_C, rows * heads_width * size,
                                 rows * p.H * p.D * size, rows * F * size};
        char** const names[] = {&y, &branch, &sums[0], &sums[1], &heads, &attended, &hidden};
        int64_t all = 0;
        for (const int64_t n : bytes) all += n;
        room = std::make_unique_for_overwrite<char[]>(all);
        char* at = room.get();
        for (int i = 0; i < 7; ++i) {
            *names[i] = at;
            at += bytes[i];
        }
    }

    // to = norm(x + residual), which goes to sum; sum may be `to`. Without a residual it is x.
    void norm(const Norm& n, const void* x, const void* residual, void* sum, void* to) const {
        layer_norm_fwd({x, residual, n.weight, n.bias, to, residual == nullptr ? nullptr : sum,
                        nullptr, nullptr, rows, p.C, p.C, p.C, n.eps, {nullptr, 0, 1.0f}, p.dtype,
                        p.dtype, p.dtype, p.dtype},
                       threads);
    }

    void product(const Weights& w, const void* x, void* to, int64_t N, int64_t K) const {
        linear({x, w.weight, w.bias, to, rows, N, K, K, w.stride, p.dtype, false}, threads);
    }

    // The keys or values in `heads`, from head `first` on, go into the cache.
    void append(int64_t first, void* cache) const {
        const int64_t bytes = p.Hk * p.D * size;
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t place = row / p.T * p.Tmax + p.positions[row];
            std::memcpy(static_cast<char*>(cache) + place * bytes,
                        heads + (row * heads_width + first * p.D) * size, bytes);
        }
    }

    void attention(const DecoderBlock& b, const void* x) const {
        product(b.c_attn, x, heads, heads_width, p.C);
        append(p.H, b.k);
        append(p.H + p.Hk, b.v);
        const Strides q{p.T * heads_width, heads_width, p.D};
        const Strides cache{p.Tmax * p.Hk * p.D, p.Hk * p.D, p.D};
        attention_decode({heads, b.k, b.v, nullptr, nullptr, p.key_lengths, nullptr, attended,
                          nullptr, q, cache, cache, p.R, p.T, p.Tmax, p.H, p.Hk, p.D, p.D, 1,
                          p.Tmax, p.R, b.left, 0, 0, 0, p.softmax_scale, 0, p.dtype},
                         threads);
        product(b.c_proj, attended, branch, p.C, p.H * p.D);
    }

    void mlp(const DecoderBlock& b, const void* x) const {
        product(b.c_fc, x, hidden, b.F, p.C);
        gelu_fwd({hidden, hidden, rows * b.F, b.tanh, p.dtype}, threads);
        product(b.mlp_c_proj, hidden, branch, p.C, b.F);
    }

    void pre_norm(const std::vector<DecoderBlock>& blocks) const {
        const void *x = p.x, *stream = nullptr;
        for (const DecoderBlock& b : blocks) {
            norm(b.ln_1, x, stream, sums[0], y);
            attention(b, y);
            norm(b.ln_2, branch, stream == nullptr ? x : sums[0], sums[1], y);
            mlp(b, y);
            x = branch;
            stream = sums[1];
        }
        norm(p.ln_f, x, stream, p.y, p.y);
    }

    void post_norm(const std::vector<DecoderBlock>& blocks) const {
        const void* x = p.x;
        for (const DecoderBlock& b : blocks) {
            attention(b, x);
            norm(b.ln_1, branch, x, y, y);
            mlp(b, y);
            void* const to = &b == &blocks.back() ? p.y : sums[0];
            norm(b.ln_2, branch, y, to, to);
            x = to;
        }
    }
};

}  // namespace

void decoder_step(const DecoderStep& p, const std::vector<DecoderBlock>& blocks, int threads) {
    int64_t F = 0;
    for (const DecoderBlock& b : blocks) F = std::max(F, b.F);
    const Step step(p, F, threads);
    p.pre_norm ? step.pre_norm(blocks) : step.post_norm(blocks);
}

}  // namespace gk::cpu
