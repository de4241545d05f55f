// Runs every CPU kernel on several threads, each instruction set that this machine has: for the
// sanitizers, which say what is wrong. `make sanitize` builds and runs it.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "cpu/attention/decode/params.h"
#include "cpu/cross_entropy/params.h"
#include "cpu/decoder/params.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

using namespace gk::cpu;

namespace {

constexpr int kThreads = 8;

// Room for n numbers of a dtype, exactly: the sanitizer finds an access past it.
std::vector<char> room(int64_t n, DType dtype) {
    return std::vector<char>(n * bytes_of(dtype));
}

void layer_norm(int64_t rows, int64_t cols, DType x_dtype, DType residual_dtype, bool dropping) {
    const DType sum_dtype = residual_dtype == DType::float32 ? DType::float32 : x_dtype;
    const int64_t n = rows * cols, rng[2] = {7, 9};
    const Dropout dropout{dropping ? rng : nullptr, 20000, 1.5f};
    auto x = room(n, x_dtype), y = x, dx = x;
    auto residual = room(n, residual_dtype), dresidual = residual, sum = room(n, sum_dtype);
    std::vector<float> weight(cols, 1), bias(cols, 2), mean(rows), rstd(rows), dweight(cols),
        dbias(cols);
    layer_norm_fwd({x.data(), residual.data(), weight.data(), bias.data(), y.data(), sum.data(),
                    mean.data(), rstd.data(), rows, cols, cols, cols, 1e-5f, dropout, x_dtype,
                    residual_dtype, DType::float32, sum_dtype},
                   kThreads);
    layer_norm_bwd({y.data(), sum.data(), sum.data(), mean.data(), rstd.data(), weight.data(),
                    dx.data(), dresidual.data(), dweight.data(), dbias.data(), rows, cols, cols,
                    dropout, x_dtype, residual_dtype, DType::float32, sum_dtype},
                   kThreads);
}

// What may be absent is.
void plain_layer_norm(int64_t rows, int64_t cols, DType dtype, bool dropping) {
    const int64_t rng[2] = {7, 9};
    const Dropout dropout{dropping ? rng : nullptr, 20000, 1.5f};
    auto x = room(rows * cols, dtype), y = x, sum = x;
    std::vector<float> weight(cols, 1), mean(rows), rstd(rows);
    layer_norm_fwd({x.data(), nullptr, weight.data(), nullptr, y.data(),
                    dropping ? sum.data() : nullptr, nullptr, nullptr, rows, cols, cols, cols,
                    1e-5f, dropout, dtype, dtype, DType::float32, dtype},
                   kThreads);
    layer_norm_bwd({y.data(), nullptr, x.data(), mean.data(), rstd.data(), weight.data(),
                    x.data(), nullptr, nullptr, nullptr, rows, cols, cols, dropout, dtype, dtype,
                    DType::float32, dtype},
                   kThreads);
}

void gelu(int64_t rows, int64_t cols, DType dtype, bool tanh) {
    auto h = room(rows * cols, dtype), a = h, dh = h, db = room(cols, dtype);
    gelu_fwd({h.data(), a.data(), rows * cols, tanh, dtype}, kThreads);
    gelu_bwd({h.data(), a.data(), dh.data(), a.data(), db.data(), rows, cols, tanh, dtype},
             kThreads);
}

// The last row's numbers end where the rows' memory ends. Forward alone, with the gradient, and the
// gradient alone.
void cross_entropy(int64_t rows, int64_t cols, int64_t gap, DType dtype, float smoothing,
                   float softcap) {
    const int64_t stride = cols + gap;
    auto logits = room((rows - 1) * stride + cols, dtype);
    for (size_t i = 0; i < logits.size(); i += 3) logits[i] = static_cast<char>(i % 60);
    // One that does not count, the first and the last class, and such as are no classes.
    const int64_t some[] = {-100, 0, cols - 1, cols, -1, INT64_MIN, INT64_MAX};
    std::vector<int64_t> targets(rows);
    for (int64_t i = 0; i < rows; ++i) targets[i] = some[(i + cols) % 7];
    std::vector<float> dloss(rows, 0.5f), losses(rows), lse(rows);
    CrossEntropy p{logits.data(), targets.data(), nullptr, losses.data(), lse.data(), rows, cols,
                   stride, -100, smoothing, 0.01f, softcap, dtype};
    gk::cpu::cross_entropy(p, kThreads);
    p.dloss = dloss.data();
    gk::cpu::cross_entropy(p, kThreads);
    p.losses = p.lse = nullptr;
    gk::cpu::cross_entropy(p, kThreads);
    std::vector<float> sum(cols);
    auto part = room(cols, dtype), out = part;
    for (int time = 0; time < 3; ++time)
        accumulate({sum.data(), part.data(), time == 2 ? out.data() : nullptr, cols, time == 0,
                    dtype},
                   kThreads);
}

// Backward needs out and lse, so forward runs first. mask: kind of attn_mask.
void attention(int64_t Tq, int64_t Tk, int64_t D, int64_t Dv, DType dtype, bool packed,
               bool options, MaskKind kind) {
    const int64_t B = 2, H = 4, Hk = 2, rng[2] = {7, 9};
    const int32_t queries[] = {0, static_cast<int32_t>(Tq / 3), static_cast<int32_t>(Tq)};
    const int32_t keys[] = {0, static_cast<int32_t>(Tk / 2), static_cast<int32_t>(Tk)};
    const int32_t lengths[] = {static_cast<int32_t>(Tk), static_cast<int32_t>(Tk / 2)};
    const std::vector<float> slopes(B * H, 0.3f), sinks(H, 0.5f);
    const int64_t entries = packed ? 1 : B;
    auto added = kind == MaskKind::visible ? std::vector<char>(Tq * Tk) : room(Tq * Tk, dtype);
    // The first rows are alike: all hidden, or nothing added.
    for (size_t i = added.size() / 2; i < added.size(); i += 5) added[i] = 1;
    AttentionCall call{B, Tq, Tk, H, Hk, D, Dv, 0.1f, -1, 0, 0, nullptr, 0, nullptr, nullptr,
                       nullptr, nullptr, {added.data(), {0, 0, Tk, 1}, kind, dtype},
                       {nullptr, 0, 1}, dtype};
    if (packed) call.cu_seqlens_q = queries, call.cu_seqlens_k = keys;
    if (options) {
        call.left = 40, call.softcap = 2, call.sinks = sinks.data();
        call.alibi_slopes = slopes.data(), call.alibi_stride = H;
        call.dropout = {rng, 20000, 1.5f};
        if (!packed) call.key_lengths = lengths;
    }
    const Strides q_by{Tq * H * D, H * D, D}, k_by{Tk * Hk * D, Hk * D, D};
    const Strides out_by{Tq * H * Dv, H * Dv, Dv}, v_by{Tk * Hk * Dv, Hk * Dv, Dv};
    auto q = room(entries * Tq * H * D, dtype), dq = q;
    auto k = room(entries * Tk * Hk * D, dtype), dk = k;
    auto out = room(entries * Tq * H * Dv, dtype), dout = out;
    auto v = room(entries * Tk * Hk * Dv, dtype), dv = v;
    if (options) k[1] = k[3] = v[1] = v[3] = 0x7f;  // in 16 bits a NaN
    std::vector<float> lse(entries * H * Tq), by_query(lse), dmask(Tq * Tk);
    attention_fwd({call, q.data(), k.data(), v.data(), q_by, k_by, v_by, out.data(), lse.data()},
                  kThreads);
    attention_bwd({call, q.data(), k.data(), v.data(), dout.data(), q_by, k_by, v_by, out_by,
                   out.data(), lse.data(), lse.data(), dq.data(), dk.data(), dv.data(),
                   kind == MaskKind::added ? dmask.data() : nullptr, {0, 0, Tk, 1},
                   options ? by_query.data() : nullptr},
                  kThreads);
}

void linear_rows(int64_t M, int64_t N, int64_t K, bool bias, DType dtype, bool transposed) {
    const auto x = room(M * K, dtype), w = room(N * K, dtype), b = room(N, dtype);
    auto y = room(M * N, dtype);
    linear({x.data(), w.data(), bias ? b.data() : nullptr, y.data(), M, N, K, K,
            transposed ? N : K, dtype, transposed},
           kThreads);
}

void masks(int64_t rows, int64_t cols) {
    const int64_t rng[2] = {7, 9};
    std::vector<uint8_t> keep(3 * rows * cols);
    elementwise_keep({{rng, 20000, 1}, keep.data(), 3 * rows * cols}, kThreads);
    attention_keep({{rng, 20000, 1}, keep.data(), 3, rows, cols, 5, 1}, kThreads);
}

// The longest entry is the last: past its keys, and past the numbers of its pages, is nothing.
void decode(int64_t Tq, int64_t H, int64_t Hk, int64_t D, int64_t Dv, int64_t page,
            int64_t left, int64_t num_splits, DType dtype) {
    const std::vector<int32_t> lengths{77, 0, 1, 300};
    const int64_t B = static_cast<int64_t>(lengths.size()), longest = 300;
    const int64_t pages = page == 0 ? 1 : (longest + page - 1) / page;
    const int64_t entries = page == 0 ? B : B * pages, size = page == 0 ? longest : page;
    const auto q = room(B * Tq * H * D, dtype), k = room(entries * size * Hk * D, dtype),
               v = room(entries * size * Hk * Dv, dtype);
    auto out = room(B * Tq * H * Dv, dtype);
    std::vector<float> lse(B * H * Tq), slopes(B * H, 0.5f), sinks(H, 0.5f);
    std::vector<int32_t> table(B * pages);
    for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(table.size() - 1 - i);
    // A number that the kernels clamp.
    if (page != 0) table[0] = 1 << 30;
    // Tokens first, or heads first.
    const auto of_cache = [&](int64_t width) {
        return left < 0 ? Strides{size * Hk * width, Hk * width, width}
                        : Strides{size * Hk * width, width, size * width};
    };
    attention_decode({q.data(), k.data(), v.data(), left < 0 ? nullptr : slopes.data(),
                      left < 0 ? nullptr : sinks.data(), lengths.data(),
                      page == 0 ? nullptr : table.data(), out.data(),
                      num_splits == 1 ? nullptr : lse.data(), {Tq * H * D, H * D, D}, of_cache(D),
                      of_cache(Dv), B, Tq, pages * size, H, Hk, D, Dv, pages, size, entries, left,
                      num_splits - 1, H, num_splits, 0.3f, left < 0 ? 0.0f : 2.0f, dtype},
                     kThreads);
}

// The last text's token is the last one that the cache has room for.
void decoder(int64_t R, int64_t T, bool pre_norm, DType dtype) {
    const int64_t Tmax = 5, H = 4, Hk = 2, D = 7, C = H * D, F = 33, heads = (H + 2 * Hk) * D;
    const auto x = room(R * T * C, dtype), norm = room(C, dtype), c_attn = room(heads * C, dtype),
               c_proj = room(C * C, dtype), c_fc = room(F * C, dtype), bias = room(F, dtype);
    auto y = x;
    auto k = room(R * Tmax * Hk * D, dtype), v = k;
    std::vector<int64_t> positions(R * T, 0);
    std::vector<int32_t> lengths(R, 0);
    positions.back() = Tmax - 1;
    lengths.back() = Tmax;
    const Norm n{norm.data(), norm.data(), 1e-5f};
    const DecoderBlock block{n, n, {c_attn.data(), nullptr, C}, {c_proj.data(), nullptr, C},
                             {c_fc.data(), bias.data(), C}, {c_fc.data(), nullptr, F}, k.data(),
                             v.data(), F, 2, true};
    decoder_step({x.data(), y.data(), positions.data(), lengths.data(), R, T, Tmax, C, H, Hk, D,
                  0.3f, pre_norm, n, dtype},
                 {block, block, block}, kThreads);
}

}  // namespace

int main() {
    constexpr DType kAll[] = {DType::float32, DType::bfloat16, DType::float16};
    for (const std::string& isa : instruction_sets()) {
        use(isa);
        for (int64_t rows : {1, 3, 70})
            for (int64_t cols : {1, 7, 16, 33, 500}) {
                masks(rows, cols);
                for (DType dtype : kAll) {
                    for (bool tanh : {false, true}) gelu(rows, cols, dtype, tanh);
                    for (bool dropping : {false, true})
                        plain_layer_norm(rows, cols, dtype, dropping);
                    for (DType residual : kAll)
                        for (bool dropping : {false, true})
                            layer_norm(rows, cols, dtype, residual, dropping);
                }
            }
        for (DType dtype : kAll)
            for (int64_t cols : {1, 2, 7, 16, 33, 63, 500, 4097, 9001})
                for (int64_t rows : {1, 3, 70})
                    for (float smoothing : {0.0f, 0.1f})
                        for (float softcap : {0.0f, 5.0f})
                            if (rows < 70 || cols <= 500)
                                cross_entropy(rows, cols, cols % 3 * 5, dtype, smoothing, softcap);
        for (DType dtype : kAll)
            for (int64_t M : {1, 3, 8, 16})
                for (int64_t N : {1, 17, 48, 1000})
                    for (int64_t K : {1, 31, 128, 300})
                        for (bool transposed : {false, true})
                            linear_rows(M, N, K, N > K, dtype, transposed);
        for (DType dtype : kAll)
            for (int64_t D : {1, 7, 16, 20, 64, 512})
                for (int64_t page : {0, 1, 5})
                    for (int64_t left : {-1, 20})
                        for (int64_t num_splits : {0, 1, 3})
                            for (int64_t Tq : {1, 3, 18})
                                decode(Tq, 4, 2, D, left < 0 ? D : 513 - D, page, left, num_splits,
                                       dtype);
        for (DType dtype : kAll)
            for (int64_t R : {1, 3, 16})
                for (bool pre_norm : {false, true}) {
                    decoder(R, 1, pre_norm, dtype);
                    if (R < 16) decoder(R, 4, pre_norm, dtype);
                }
        for (int64_t T : {1, 45, 300})
            for (int64_t D : {3, 64, 129})
                for (DType dtype : kAll)
                    for (bool options : {false, true}) {
                        const int64_t Dv = options ? 130 - D : D;
                        attention(T, T + 7, D, Dv, dtype, true, options, MaskKind::none);
                        attention(T + 2, T, D, Dv, dtype, false, options, MaskKind::none);
                        if (T < 300 || D == 3)
                            for (MaskKind kind : {MaskKind::visible, MaskKind::added})
                                attention(T, T, D, Dv, dtype, false, options, kind);
                        if (T == 45)
                            attention(T, T, 512 - D, 509 + D % 4, dtype, true, options,
                                      MaskKind::none);
                    }
        std::printf("%s: done\n", isa.c_str());
    }
}
