// Accesses outside of tensors and shared memory, misaligned, of memory never written, to inputs.
#include "cases.h"
#include "device/vector.h"

namespace {

// a (n,) in, b (n,) out; one thread an element
GK_CASE(past_end) {
    unsigned i = threadIdx.x;
    p.b[i + p.broken] = p.a[i];  // past_end
}

GK_CASE(before_start) {
    int i = int(threadIdx.x);
    p.b[i] = p.a[i - p.broken];  // before_start
}

__device__ void store_bf16(__nv_bfloat16* to, float x) {
    *to = __float2bfloat16_rn(x);  // bf16_past_end
}

// c (n,) bf16 out
GK_CASE(bf16_past_end) {
    auto to = static_cast<__nv_bfloat16*>(p.c) + threadIdx.x + p.broken;
    store_bf16(to, 1.0f);  // bf16_past_end: caller
}

// a (n,) in, b (n,) out, n floats of shared memory
GK_CASE(shared_past_end) {
    unsigned i = threadIdx.x;
    arena()[i] = p.a[i];
    __syncthreads();
    unsigned next = (i + 1) % p.n;
    p.b[i] = arena()[p.broken ? i + 1 : next];  // shared_past_end
}

GK_CASE(shared_before_start) {
    int i = int(threadIdx.x);
    arena()[i - p.broken] = p.a[i];  // shared_before_start
    p.b[i] = arena()[i - p.broken];
}

// b (30,) out, 8 threads: the last 16 bytes are half inside
GK_CASE(straddles_the_end) {
    if (!p.broken && threadIdx.x == 7) return;
    gk::st128(p.b + 4 * threadIdx.x, gk::Pack<float, 4>{});  // straddles_the_end
}

// a (n + 4,) in, b (n,) out, n / 4 threads
GK_CASE(misaligned_16) {
    unsigned i = 4 * threadIdx.x;
    gk::st128(p.b + i, gk::ld128(p.a + i + p.broken));  // misaligned_16
}

GK_CASE(misaligned_8) {
    unsigned i = 2 * threadIdx.x;
    auto pair = *reinterpret_cast<const float2*>(p.a + i + p.broken);  // misaligned_8
    p.b[i] = pair.x;
    p.b[i + 1] = pair.y;
}

// a (n,) in, b (n,) out, n floats of shared memory
GK_CASE(shared_unwritten) {
    unsigned i = threadIdx.x;
    if (!p.broken || i % 2 == 0) arena()[i] = p.a[i];
    p.b[i] = arena()[i];  // shared_unwritten
}

// b (n,) out
GK_CASE(global_unwritten) {
    unsigned i = threadIdx.x;
    if (!p.broken) p.b[i] = 0.0f;
    p.b[i] += 1.0f;  // global_unwritten
}

GK_CASE(atomic_unwritten) {
    if (!p.broken) {
        if (threadIdx.x == 0) p.b[0] = 0.0f;
        __syncthreads();
    }
    atomicAdd(p.b, 1.0f);  // atomic_unwritten
}

// a (n,) in, b (n,) out
GK_CASE(write_to_input) {
    float* to = p.broken ? p.a : p.b;
    to[threadIdx.x] = 1.0f;  // write_to_input
}

GK_CASE(null_pointer) {
    const float* from = p.broken ? nullptr : p.a;
    p.b[threadIdx.x] = from[threadIdx.x];  // null_pointer
}

GK_CASE(far_away) {
    const float* from = p.broken ? p.a + (int64_t(1) << 40) : p.a;
    p.b[threadIdx.x] = from[threadIdx.x];  // far_away
}

// One pointer in shared memory
GK_CASE(other_local_memory) {
    auto shared = reinterpret_cast<const volatile float**>(gk::shared_memory());
    volatile float mine = p.a[threadIdx.x];
    if (threadIdx.x == 0) *shared = &mine;
    __syncthreads();
    p.b[threadIdx.x] = p.broken ? **shared : mine;  // other_local_memory
}

}  // namespace
