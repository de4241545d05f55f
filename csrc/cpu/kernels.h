// The kernels of one instruction set. Each takes a part of the rows; what cuts rows into parts, the
// launchers, is compiled once.
#pragma once

#include "cpu/attention/decode/params.h"
#include "cpu/attention/params.h"
#include "cpu/cross_entropy/params.h"
#include "cpu/dropout/params.h"
#include "cpu/gelu_mlp/params.h"
#include "cpu/layer_norm/params.h"
#include "cpu/linear/params.h"

namespace gk::cpu {

struct Kernels {
    const char* isa;
    // Widens n numbers to fp32, and rounds n fp32 numbers to a dtype.
    void (*widen)(DType dtype, const void* from, float* to, int64_t n);
    void (*round)(DType dtype, const float* from, void* to, int64_t n);
    // Adds `parts` rows of n numbers, one after another, to the first one: rows[0] += rows[1] + ...
    void (*add_rows)(float* rows, int64_t parts, int64_t stride, int64_t first, int64_t last);
    // Rows first ... last - 1. weight, bias: in fp32.
    void (*layer_norm_fwd)(const LayerNormFwd& p, const float* weight, const float* bias,
                           int64_t first, int64_t last);
    // dweight, dbias: (cols,), to which the rows' parts are added; or null.
    void (*layer_norm_bwd)(const LayerNormBwd& p, const float* weight, float* dweight, float* dbias,
                           int64_t first, int64_t last);
    void (*gelu_fwd)(const GeluFwd& p, int64_t first, int64_t last);
    void (*gelu_bwd)(const GeluBwd& p, float* db, int64_t first, int64_t last);
    void (*cross_entropy)(const CrossEntropy& p, int64_t first, int64_t last);
    void (*accumulate)(const Accumulate& p, int64_t first, int64_t last);
    // x as linear takes it, in so many bytes; and the columns first ... last - 1 of y.
    int64_t (*linear_scratch)(const Linear& p);
    void (*linear_ready)(const Linear& p, void* x);
    void (*linear)(const Linear& p, const void* x, int64_t first, int64_t last);
    // An item, with scratch memory of as many bytes as the functions below say.
    void (*attention_fwd)(const AttentionFwd& p, const AttentionItem& item, void* scratch);
    void (*attention_bwd)(const AttentionBwd& p, const BackwardItem& item, void* scratch);
    void (*attention_mask_bwd)(const AttentionBwd& p, const MaskItem& item, void* scratch);
    int64_t (*attention_fwd_scratch)(const AttentionFwd& p);
    int64_t (*attention_bwd_scratch)(const AttentionBwd& p);
    void (*elementwise_keep)(const ElementwiseKeep& p, int64_t first, int64_t last);
    // Rows of all heads, numbered head by head.
    void (*attention_keep)(const AttentionKeep& p, int64_t first, int64_t last);
    // scratch: decode_scratch floats.
    void (*attention_decode)(const AttentionDecode& p, const DecodeItem* items, int64_t count,
                             float* scratch);
    void (*attention_decode_combine)(const AttentionDecode& p, const DecodeSplits* splits,
                                     int64_t count);
};

// What the kernel files of one instruction set define; GK_ISA is its name.
#ifdef GK_ISA
namespace GK_ISA {
void widen(DType dtype, const void* from, float* to, int64_t n);
void round(DType dtype, const float* from, void* to, int64_t n);
void add_rows(float* rows, int64_t parts, int64_t stride, int64_t first, int64_t last);
void layer_norm_fwd(const LayerNormFwd& p, const float* weight, const float* bias, int64_t first,
                    int64_t last);
void layer_norm_bwd(const LayerNormBwd& p, const float* weight, float* dweight, float* dbias,
                    int64_t first, int64_t last);
void gelu_fwd(const GeluFwd& p, int64_t first, int64_t last);
void gelu_bwd(const GeluBwd& p, float* db, int64_t first, int64_t last);
void cross_entropy(const CrossEntropy& p, int64_t first, int64_t last);
void accumulate(const Accumulate& p, int64_t first, int64_t last);
int64_t linear_scratch(const Linear& p);
void linear_ready(const Linear& p, void* x);
void linear(const Linear& p, const void* x, int64_t first, int64_t last);
// The same where w is transposed. x: (M, K) in fp32.
void linear_transposed(const Linear& p, const float* x, int64_t x_stride, int64_t first,
                       int64_t last);
void attention_fwd(const AttentionFwd& p, const AttentionItem& item, void* scratch);
void attention_bwd(const AttentionBwd& p, const BackwardItem& item, void* scratch);
void attention_mask_bwd(const AttentionBwd& p, const MaskItem& item, void* scratch);
int64_t attention_fwd_scratch(const AttentionFwd& p);
int64_t attention_bwd_scratch(const AttentionBwd& p);
void elementwise_keep(const ElementwiseKeep& p, int64_t first, int64_t last);
void attention_keep(const AttentionKeep& p, int64_t first, int64_t last);
void attention_decode(const AttentionDecode& p, const DecodeItem* items, int64_t count,
                      float* scratch);
void attention_decode_combine(const AttentionDecode& p, const DecodeSplits* splits, int64_t count);
}  // namespace GK_ISA
#endif

}  // namespace gk::cpu
