// What the tensor memory accelerator and its neighbours give: boxes loaded, stored and added, and
// contiguous bytes likewise.
#include "barrier.h"
#include "device/cluster.h"
#include "device/tma.h"

namespace {

__device__ void copy_words(void* to, const void* from, int bytes) {
    for (int i = static_cast<int>(threadIdx.x); i < bytes / 4; i += static_cast<int>(blockDim.x)) {
        static_cast<unsigned*>(to)[i] = static_cast<const unsigned*>(from)[i];
    }
}

template <int N>
__device__ gk::Coordinates<N> coordinates_of(const Case& p) {
    gk::Coordinates<N> at;
    for (int i = 0; i < N; ++i) at.at[i] = p.at[i];
    return at;
}

// b (bytes,) out: shared memory as the load of the box leaves it.
template <int N>
__global__ void load(const __grid_constant__ Case p) {
    uint64_t* bar = barrier_of(p);
    make_barrier(bar);
    __syncthreads();
    if (threadIdx.x == 0) {
        gk::tma_prefetch(&p.map);
        gk::mbarrier_arrive_expect_tx(bar, static_cast<unsigned>(p.bytes));
        gk::tma_load(gk::shared_memory(), &p.map, bar, coordinates_of<N>(p),
                     static_cast<gk::CacheHint>(p.n));
    }
    gk::mbarrier_wait(bar, 0);
    copy_words(p.b, gk::shared_memory(), p.bytes);
}

// a (bytes,) in: shared memory, of which the box is stored, or added to what is there.
template <int N, bool kAdd>
__global__ void store(const __grid_constant__ Case p) {
    copy_words(gk::shared_memory(), p.a, p.bytes);
    gk::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        if constexpr (kAdd) {
            gk::tma_reduce_add(&p.map, gk::shared_memory(), coordinates_of<N>(p));
        } else {
            gk::tma_store(&p.map, gk::shared_memory(), coordinates_of<N>(p));
        }
        gk::bulk_commit();
        gk::bulk_wait_read<0>();
    }
}

// Boxes 0, 1, ... n - 1 along the outermost of two dimensions, through two stages each for loads
// and stores, to the same place of the tensor b, which has a's size: twice what a holds, fp32.
GK_CASE(through_stages) {
    unsigned char* stages = gk::shared_memory();
    auto full = reinterpret_cast<uint64_t*>(stages + 4 * p.bytes);
    make_barrier(full);
    make_barrier(full + 1);
    __syncthreads();
    const auto fetch = [&](int i) {
        if (threadIdx.x != 0 || i >= p.n) return;
        gk::mbarrier_arrive_expect_tx(full + i % 2, static_cast<unsigned>(p.bytes));
        gk::tma_load(stages + i % 2 * p.bytes, &p.map, full + i % 2,
                     gk::Coordinates<2>{{0, i * p.at[1]}});
    };
    fetch(0);
    fetch(1);
    for (int i = 0; i < p.n; ++i) {
        gk::mbarrier_wait(full + i % 2, static_cast<unsigned>(i / 2 % 2));
        if (threadIdx.x == 0) gk::bulk_wait_read<1>();
        __syncthreads();
        auto from = reinterpret_cast<const float*>(stages + i % 2 * p.bytes);
        auto to = reinterpret_cast<float*>(stages + (2 + i % 2) * p.bytes);
        for (int j = static_cast<int>(threadIdx.x); j < p.bytes / 4;
             j += static_cast<int>(blockDim.x)) {
            to[j] = 2.0f * from[j];
        }
        gk::fence_proxy_async();
        __syncthreads();
        fetch(i + 2);
        if (threadIdx.x == 0) {
            gk::bulk_store(reinterpret_cast<unsigned char*>(p.b) + i * p.bytes, to,
                           static_cast<unsigned>(p.bytes));
            gk::bulk_commit();
        }
    }
    if (threadIdx.x == 0) gk::bulk_wait_read<0>();
}

// a (bytes,) in, b (bytes,) out
GK_CASE(bulk_there_and_back) {
    uint64_t* bar = barrier_of(p);
    const auto bytes = static_cast<unsigned>(p.bytes);
    make_barrier(bar);
    __syncthreads();
    if (threadIdx.x != 0) return;
    gk::mbarrier_arrive_expect_tx(bar, bytes);
    gk::bulk_load(gk::shared_memory(), p.a, bytes, bar);
    gk::mbarrier_wait(bar, 0);
    gk::bulk_store(p.b, gk::shared_memory(), bytes);
    gk::bulk_commit();
    gk::bulk_wait<0>();
}

// a (bytes / 4,) fp32 in, b likewise inout: b + a from each CTA
GK_CASE(bulk_add) {
    copy_words(gk::shared_memory(), p.a, p.bytes);
    gk::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    gk::bulk_reduce_add(p.b, arena(), static_cast<unsigned>(p.bytes));
    gk::bulk_commit();
    gk::bulk_wait_read<0>();
}

// Clusters of n. Box i of the innermost dimension but one is loaded by CTA i and given to all.
// b (clusters, n CTAs, n boxes, bytes) out
GK_CASE(multicast) {
    unsigned char* boxes = gk::shared_memory();
    const unsigned rank = gk::cluster_rank();
    const int all = p.n * p.bytes;
    auto bar = reinterpret_cast<uint64_t*>(boxes + all);
    make_barrier(bar);
    gk::cluster_sync();
    if (threadIdx.x == 0) {
        gk::mbarrier_arrive_expect_tx(bar, static_cast<unsigned>(all));
        gk::tma_load_multicast(boxes + static_cast<int>(rank) * p.bytes, &p.map, bar,
                               gk::Coordinates<2>{{0, static_cast<int>(rank) * p.at[1]}},
                               static_cast<uint16_t>((1u << p.n) - 1));
    }
    gk::mbarrier_wait(bar, 0);
    copy_words(reinterpret_cast<unsigned char*>(p.b) + blockIdx.x * static_cast<unsigned>(all), boxes,
               all);
    gk::cluster_sync();
}

const NamedCase box_cases[] = {
    {"load_1", load<1>},
    {"load_2", load<2>},
    {"load_3", load<3>},
    {"load_4", load<4>},
    {"load_5", load<5>},
    {"store_1", store<1, false>},
    {"store_2", store<2, false>},
    {"store_3", store<3, false>},
    {"store_4", store<4, false>},
    {"store_5", store<5, false>},
    {"add_1", store<1, true>},
    {"add_2", store<2, true>},
    {"add_3", store<3, true>},
    {"add_4", store<4, true>},
    {"add_5", store<5, true>},
};

}  // namespace
