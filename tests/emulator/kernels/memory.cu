// Accesses outside of tensors and shared memory, misaligned, of memory never written, to inputs.
#include "cases.h"
#include "device/vector.h"

namespace {

// a (n,) in, b (n,) out; one thread an element
__global__ void past_end(const Case p) {
    unsigned i = threadIdx.x;
    p.b[i + p.broken] = p.a[i];  // past_end
}

__global__ void before_start(const Case p) {
    int i = int(threadIdx.x);
    p.b[i] = p.a[i - p.broken];  // before_start
}

__device__ void store_bf16(__nv_bfloat16* to, float x) {
    *to = __float2bfloat16_rn(x);  // bf16_past_end
}

// c (n,) bf16 out
__global__ void bf16_past_end(const Case p) {
    auto to = static_cast<__nv_bfloat16*>(p.c) + threadIdx.x + p.broken;
    store_bf16(to, 1.0f);  // bf16_past_end: caller
}

// a (n,) in, b (n,) out, n floats of shared memory
__global__ void shared_past_end(const Case p) {
    auto shared = reinterpret_cast<float*>(gk::shared_memory());
    unsigned i = threadIdx.x;
    shared[i] = p.a[i];
    __syncthreads();
    unsigned next = (i + 1) % p.n;
    p.b[i] = shared[p.broken ? i + 1 : next];  // shared_past_end
}

__global__ void shared_before_start(const Case p) {
    auto shared = reinterpret_cast<float*>(gk::shared_memory());
    int i = int(threadIdx.x);
    shared[i - p.broken] = p.a[i];  // shared_before_start
    p.b[i] = shared[i - p.broken];
}

// b (30,) out, 8 threads: the last 16 bytes are half inside
__global__ void straddles_the_end(const Case p) {
    if (!p.broken && threadIdx.x == 7) return;
    gk::st128(p.b + 4 * threadIdx.x, gk::Pack<float, 4>{});  // straddles_the_end
}

// a (n + 4,) in, b (n,) out, n / 4 threads
__global__ void misaligned_16(const Case p) {
    unsigned i = 4 * threadIdx.x;
    gk::st128(p.b + i, gk::ld128(p.a + i + p.broken));  // misaligned_16
}

__global__ void misaligned_8(const Case p) {
    unsigned i = 2 * threadIdx.x;
    auto pair = *reinterpret_cast<const float2*>(p.a + i + p.broken);  // misaligned_8
    p.b[i] = pair.x;
    p.b[i + 1] = pair.y;
}

// a (n,) in, b (n,) out, n floats of shared memory
__global__ void shared_unwritten(const Case p) {
    auto shared = reinterpret_cast<float*>(gk::shared_memory());
    unsigned i = threadIdx.x;
    if (!p.broken || i % 2 == 0) shared[i] = p.a[i];
    p.b[i] = shared[i];  // shared_unwritten
}

// b (n,) out
__global__ void global_unwritten(const Case p) {
    unsigned i = threadIdx.x;
    if (!p.broken) p.b[i] = 0.0f;
    p.b[i] += 1.0f;  // global_unwritten
}

__global__ void atomic_unwritten(const Case p) {
    if (!p.broken) {
        if (threadIdx.x == 0) p.b[0] = 0.0f;
        __syncthreads();
    }
    atomicAdd(p.b, 1.0f);  // atomic_unwritten
}

// a (n,) in, b (n,) out
__global__ void write_to_input(const Case p) {
    float* to = p.broken ? p.a : p.b;
    to[threadIdx.x] = 1.0f;  // write_to_input
}

__global__ void null_pointer(const Case p) {
    const float* from = p.broken ? nullptr : p.a;
    p.b[threadIdx.x] = from[threadIdx.x];  // null_pointer
}

__global__ void far_away(const Case p) {
    const float* from = p.broken ? p.a + (int64_t(1) << 40) : p.a;
    p.b[threadIdx.x] = from[threadIdx.x];  // far_away
}

// One pointer in shared memory
__global__ void other_local_memory(const Case p) {
    auto shared = reinterpret_cast<const volatile float**>(gk::shared_memory());
    volatile float mine = p.a[threadIdx.x];
    if (threadIdx.x == 0) *shared = &mine;
    __syncthreads();
    p.b[threadIdx.x] = p.broken ? **shared : mine;  // other_local_memory
}

}  // namespace

const NamedCase kMemoryCases[] = {
    {"past_end", past_end},
    {"before_start", before_start},
    {"bf16_past_end", bf16_past_end},
    {"shared_past_end", shared_past_end},
    {"shared_before_start", shared_before_start},
    {"straddles_the_end", straddles_the_end},
    {"misaligned_16", misaligned_16},
    {"misaligned_8", misaligned_8},
    {"shared_unwritten", shared_unwritten},
    {"global_unwritten", global_unwritten},
    {"atomic_unwritten", atomic_unwritten},
    {"write_to_input", write_to_input},
    {"null_pointer", null_pointer},
    {"far_away", far_away},
    {"other_local_memory", other_local_memory},
    {nullptr, nullptr},
};
