// What goes wrong around bulk copies: each mistake beside the same kernel without it.
#include "device/cluster.h"
#include "device/mbarrier.h"
#include "device/semaphore.h"
#include "device/tma.h"
#include "../tma_cases.h"

namespace {

__device__ uint64_t* barrier_of(const BoxCase& p) {
    return reinterpret_cast<uint64_t*>(gk::shared_memory() + p.n);
}

__device__ float* arena() { return reinterpret_cast<float*>(gk::shared_memory()); }

__device__ gk::Coordinates<2> box_of(const BoxCase& p) { return {{p.at[0], p.at[1]}}; }

// The map is of a (rows, 32) fp32 tensor, the box 32 rows of it, 4,096 bytes; n bytes of shared
// memory lie before the barrier. One warp.
__device__ void start_load(const BoxCase& p, unsigned bytes) {
    uint64_t* bar = barrier_of(p);
    if (threadIdx.x == 0) {
        gk::mbarrier_init(bar, 1);
        gk::mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        gk::mbarrier_arrive_expect_tx(bar, bytes);
        gk::tma_load(arena(), &p.map, bar, box_of(p));  // start_load
    }
}

__device__ void give(const BoxCase& p) {
    for (int i = 0; i < 32; ++i) {
        static_cast<float*>(p.b)[32 * i + static_cast<int>(threadIdx.x)] =
            arena()[32 * i + static_cast<int>(threadIdx.x)];  // give
    }
}

__global__ void load_without_wait(const __grid_constant__ BoxCase p) {
    start_load(p, 4096);
    __syncthreads();
    if (!p.broken) gk::mbarrier_wait(barrier_of(p), 0);
    give(p);  // load_without_wait
    gk::mbarrier_wait(barrier_of(p), 0);
}

__global__ void load_overwritten(const __grid_constant__ BoxCase p) {
    start_load(p, 4096);
    __syncthreads();
    if (!p.broken) gk::mbarrier_wait(barrier_of(p), 0);
    arena()[threadIdx.x] = 1.0f;  // load_overwritten
    gk::mbarrier_wait(barrier_of(p), 0);
    give(p);
}

// The stage is loaded again while others may still read it.
__global__ void load_into_read(const __grid_constant__ BoxCase p) {
    start_load(p, 4096);
    gk::mbarrier_wait(barrier_of(p), 0);
    give(p);
    if (!p.broken) __syncthreads();
    if (threadIdx.x == 0) {
        gk::mbarrier_arrive_expect_tx(barrier_of(p), 4096);
        gk::tma_load(arena(), &p.map, barrier_of(p), box_of(p));  // load_into_read
    }
    gk::mbarrier_wait(barrier_of(p), 1);
}

// Two loads to one place.
__global__ void load_into_load(const __grid_constant__ BoxCase p) {
    start_load(p, 8192);
    if (threadIdx.x == 0) {
        float* to = arena() + (p.broken ? 0 : 1024);
        gk::tma_load(to, &p.map, barrier_of(p), box_of(p));  // load_into_load
    }
    gk::mbarrier_wait(barrier_of(p), 0);
    give(p);
}

// b is the map's tensor, of 64 rows.
__global__ void load_source_changed(const __grid_constant__ BoxCase p) {
    start_load(p, 4096);
    if (!p.broken) gk::mbarrier_wait(barrier_of(p), 0);
    if (threadIdx.x == 0) static_cast<float*>(p.b)[33] += 1.0f;
    gk::mbarrier_wait(barrier_of(p), 0);
}

// b is the map's tensor, of 64 rows.
__global__ void load_of_stored(const __grid_constant__ BoxCase p) {
    if (p.broken) static_cast<float*>(p.b)[33 + threadIdx.x] = 2.0f;  // load_of_stored
    gk::fence_proxy_async();
    __syncthreads();
    start_load(p, 4096);
    gk::mbarrier_wait(barrier_of(p), 0);
}

__global__ void load_never_awaited(const __grid_constant__ BoxCase p) {
    start_load(p, 4096);
    if (!p.broken) gk::mbarrier_wait(barrier_of(p), 0);
}

// n: the bytes of the barrier's phase
__global__ void load_expects(const __grid_constant__ BoxCase p) {
    start_load(p, 4096u + 16u * static_cast<unsigned>(p.broken));
    gk::mbarrier_wait(barrier_of(p), 0);  // load_expects
    give(p);
}

__global__ void load_misaligned(const __grid_constant__ BoxCase p) {
    uint64_t* bar = barrier_of(p);
    if (threadIdx.x != 0) return;
    gk::mbarrier_init(bar, 1);
    gk::mbarrier_init_fence();
    gk::mbarrier_arrive_expect_tx(bar, 4096);
    gk::tma_load(gk::shared_memory() + p.broken, &p.map, bar, box_of(p));  // load_misaligned
    gk::mbarrier_wait(bar, 0);
}

__global__ void load_past_end(const __grid_constant__ BoxCase p) {
    uint64_t* bar = barrier_of(p);
    if (threadIdx.x != 0) return;
    gk::mbarrier_init(bar, 1);
    gk::mbarrier_init_fence();
    gk::mbarrier_arrive_expect_tx(bar, 4096);
    gk::tma_load(arena() + (p.broken ? 128 : 0), &p.map, bar, box_of(p));  // load_past_end
    gk::mbarrier_wait(bar, 0);
}

__global__ void load_wrong_rank(const __grid_constant__ BoxCase p) {
    uint64_t* bar = barrier_of(p);
    if (threadIdx.x != 0) return;
    gk::mbarrier_init(bar, 1);
    gk::mbarrier_init_fence();
    gk::mbarrier_arrive_expect_tx(bar, 4096);
    if (p.broken) {
        gk::tma_load(arena(), &p.map, bar, gk::Coordinates<3>{{0, 0, 0}});  // load_wrong_rank
    } else {
        gk::tma_load(arena(), &p.map, bar, box_of(p));
    }
    gk::mbarrier_wait(bar, 0);
}

__global__ void prefetch_of_none(const __grid_constant__ BoxCase p) {
    if (threadIdx.x != 0) return;
    auto other = reinterpret_cast<const gk::TensorMap*>(&p.a);
    gk::tma_prefetch(p.broken ? other : &p.map);  // prefetch_of_none
}

__global__ void map_elsewhere(const __grid_constant__ BoxCase p) {
    if (threadIdx.x != 0) return;
    auto other = static_cast<const gk::TensorMap*>(p.a);
    gk::tma_prefetch(p.broken ? other : &p.map);  // map_elsewhere
}

// Clusters of 2.
__global__ void multicast_outside(const __grid_constant__ BoxCase p) {
    uint64_t* bar = barrier_of(p);
    if (threadIdx.x == 0) {
        gk::mbarrier_init(bar, 1);
        gk::mbarrier_init_fence();
    }
    gk::cluster_sync();
    if (threadIdx.x == 0) gk::mbarrier_arrive_expect_tx(bar, 4096);
    if (threadIdx.x == 0 && gk::cluster_rank() == 0) {
        const uint16_t mask = p.broken ? 0x5 : 0x3;
        gk::tma_load_multicast(arena(), &p.map, bar, box_of(p), mask);  // multicast_outside
    }
    gk::mbarrier_wait(bar, 0);
    gk::cluster_sync();
}

// The other CTA may still read what it was given before.
__global__ void multicast_into_read(const __grid_constant__ BoxCase p) {
    uint64_t* bar = barrier_of(p);
    if (threadIdx.x == 0) {
        gk::mbarrier_init(bar, 1);
        gk::mbarrier_init_fence();
    }
    arena()[threadIdx.x] = 1.0f;
    __syncwarp();
    static_cast<float*>(p.b)[32 * blockIdx.x + threadIdx.x] = arena()[31 - threadIdx.x];
    if (p.broken) {
        gk::cluster_arrive();
        static_cast<float*>(p.b)[32 * blockIdx.x + threadIdx.x] = arena()[threadIdx.x];  // late
        gk::cluster_wait();
    } else {
        gk::cluster_sync();
    }
    if (threadIdx.x == 0) gk::mbarrier_arrive_expect_tx(bar, 4096);
    if (threadIdx.x == 0 && gk::cluster_rank() == 0) {
        gk::tma_load_multicast(arena(), &p.map, bar, box_of(p), 0x3);  // multicast_into_read
    }
    gk::mbarrier_wait(bar, 0);
    gk::cluster_sync();
}

// ---- stores: the map's tensor is the output

__device__ void fill() {
    for (int i = 0; i < 32; ++i) {
        arena()[32 * i + static_cast<int>(threadIdx.x)] = static_cast<float>(threadIdx.x);  // fill
    }
}

__global__ void store_without_fence(const __grid_constant__ BoxCase p) {
    fill();
    if (!p.broken) gk::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    gk::tma_store(&p.map, arena(), box_of(p));  // store_without_fence
    gk::bulk_commit();
    gk::bulk_wait_read<0>();
}

// Who stores has fenced, and those who wrote have not.
__global__ void store_fenced_by_one(const __grid_constant__ BoxCase p) {
    fill();
    if (!p.broken || threadIdx.x == 0) gk::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    gk::tma_store(&p.map, arena(), box_of(p));  // store_fenced_by_one
    gk::bulk_commit();
    gk::bulk_wait_read<0>();
}

// The fence of the one who wrote comes after the barrier: before the store, as it happens.
__global__ void store_fenced_late(const __grid_constant__ BoxCase p) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < 1024; ++i) arena()[i] = 1.0f;  // filled alone
        if (!p.broken) gk::fence_proxy_async();
    }
    __syncthreads();
    if (threadIdx.x == 0 && p.broken) gk::fence_proxy_async();
    if (threadIdx.x == 15) {
        gk::tma_store(&p.map, arena(), box_of(p));  // store_fenced_late
        gk::bulk_commit();
        gk::bulk_wait_read<0>();
    }
}

__global__ void store_written_after_fence(const __grid_constant__ BoxCase p) {
    fill();
    gk::fence_proxy_async();
    if (p.broken) arena()[threadIdx.x] = 1.0f;  // after the fence
    __syncthreads();
    if (threadIdx.x != 0) return;
    gk::tma_store(&p.map, arena(), box_of(p));  // store_written_after_fence
    gk::bulk_commit();
    gk::bulk_wait_read<0>();
}

__global__ void store_without_barrier(const __grid_constant__ BoxCase p) {
    fill();
    gk::fence_proxy_async();
    if (!p.broken) __syncthreads();
    if (threadIdx.x != 31) return;
    gk::tma_store(&p.map, arena(), box_of(p));  // store_without_barrier
    gk::bulk_commit();
    gk::bulk_wait_read<0>();
}

__global__ void store_of_unwritten(const __grid_constant__ BoxCase p) {
    if (!p.broken) fill();
    gk::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    gk::tma_store(&p.map, arena(), box_of(p));  // store_of_unwritten
    gk::bulk_commit();
    gk::bulk_wait_read<0>();
}

// The storing thread itself writes the next tile too soon.
__global__ void store_source_changed(const __grid_constant__ BoxCase p) {
    fill();
    gk::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    gk::tma_store(&p.map, arena(), box_of(p));  // source changed
    gk::bulk_commit();
    if (!p.broken) gk::bulk_wait_read<0>();
    arena()[5] = -1.0f;
    gk::bulk_wait_read<0>();  // store_source_changed
}

// Another thread does, after a barrier which the wait should precede, and writes what was there.
__global__ void store_source_rewritten(const __grid_constant__ BoxCase p) {
    fill();
    gk::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        gk::tma_store(&p.map, arena(), box_of(p));  // source rewritten
        gk::bulk_commit();
        if (!p.broken) gk::bulk_wait_read<0>();
    }
    __syncthreads();
    arena()[threadIdx.x] = static_cast<float>(threadIdx.x);  // rewritten
    if (threadIdx.x == 0) gk::bulk_wait_read<0>();  // store_source_rewritten
}

__global__ void store_wait_short_by_one(const __grid_constant__ BoxCase p) {
    fill();
    gk::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    gk::tma_store(&p.map, arena(), box_of(p));  // of the older group
    gk::bulk_commit();
    gk::tma_store(&p.map, arena(), gk::Coordinates<2>{{0, p.at[1] + 32}});  // of the newer group
    gk::bulk_commit();
    gk::bulk_wait_read<1>();
    if (!p.broken) gk::bulk_wait_read<0>();
}

// As above, with the other kind of wait.
__global__ void write_wait_short_by_one(const __grid_constant__ BoxCase p) {
    fill();
    gk::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    gk::tma_store(&p.map, arena(), box_of(p));
    gk::bulk_commit();
    gk::tma_store(&p.map, arena(), gk::Coordinates<2>{{0, p.at[1] + 32}});  // the newer store
    gk::bulk_commit();
    gk::bulk_wait<1>();
    if (!p.broken) gk::bulk_wait<0>();
}

__global__ void store_never_awaited(const __grid_constant__ BoxCase p) {
    fill();
    gk::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    gk::tma_store(&p.map, arena(), box_of(p));  // store_never_awaited
    gk::bulk_commit();
    if (!p.broken) gk::bulk_wait_read<0>();
}

__global__ void store_never_committed(const __grid_constant__ BoxCase p) {
    fill();
    gk::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    gk::tma_store(&p.map, arena(), box_of(p));  // store_never_committed
    if (!p.broken) gk::bulk_commit();
    gk::bulk_wait_read<0>();
}

// b is the map's tensor, of 32 rows.
__global__ void store_read_back(const __grid_constant__ BoxCase p) {
    fill();
    gk::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    gk::tma_store(&p.map, arena(), box_of(p));  // read back
    gk::bulk_commit();
    if (p.broken) {
        gk::bulk_wait_read<0>();
    } else {
        gk::bulk_wait<0>();
    }
    arena()[0] = static_cast<const float*>(p.b)[0];  // store_read_back
}

__global__ void store_twice(const __grid_constant__ BoxCase p) {
    fill();
    gk::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    const int row = p.broken ? 0 : 32 * static_cast<int>(blockIdx.x);
    gk::tma_store(&p.map, arena(), gk::Coordinates<2>{{0, row}});  // store_twice
    gk::bulk_commit();
    gk::bulk_wait<0>();
}

// ---- contiguous bytes: a (32, 32) in, b likewise out; at: {bytes, global offset, shared offset}
__global__ void bulk_multiples(const __grid_constant__ BoxCase p) {
    uint64_t* bar = barrier_of(p);
    if (threadIdx.x != 0) return;
    gk::mbarrier_init(bar, 1);
    gk::mbarrier_init_fence();
    const unsigned bytes = p.broken ? static_cast<unsigned>(p.at[0]) : 512u;
    auto from = static_cast<const unsigned char*>(p.a) + (p.broken ? p.at[1] : 0);
    unsigned char* to = gk::shared_memory() + (p.broken ? p.at[2] : 0);
    gk::mbarrier_arrive_expect_tx(bar, bytes);
    gk::bulk_load(to, from, bytes, bar);  // bulk_multiples
    gk::mbarrier_wait(bar, 0);
    gk::bulk_store(p.b, gk::shared_memory(), bytes);
    gk::bulk_commit();
    gk::bulk_wait_read<0>();
}

__global__ void bulk_to_input(const __grid_constant__ BoxCase p) {
    fill();
    gk::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    gk::bulk_store(p.broken ? const_cast<void*>(p.a) : p.b, arena(), 512);  // bulk_to_input
    gk::bulk_commit();
    gk::bulk_wait_read<0>();
}

// b: 1,024 sums, then a semaphore, all zeros before. Two CTAs add in turn.
__global__ void sums_in_turn(const __grid_constant__ BoxCase p) {
    fill();
    gk::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    auto flag = static_cast<int*>(p.b) + 1024;
    gk::semaphore_wait(flag, static_cast<int>(blockIdx.x));
    gk::bulk_reduce_add(static_cast<float*>(p.b), arena(), 4096);  // sums_in_turn
    gk::bulk_commit();
    if (p.broken) {
        gk::bulk_wait_read<0>();
    } else {
        gk::bulk_wait<0>();
    }
    gk::semaphore_release(flag, 1);  // released early
}

// b is never written before.
__global__ void bulk_add_to_unwritten(const __grid_constant__ BoxCase p) {
    fill();
    gk::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (!p.broken) {
        gk::bulk_store(p.b, arena(), 512);
        gk::bulk_commit();
        gk::bulk_wait<0>();
    }
    gk::bulk_reduce_add(static_cast<float*>(p.b), arena(), 512);  // bulk_add_to_unwritten
    gk::bulk_commit();
    gk::bulk_wait_read<0>();
}

}  // namespace

const NamedBoxCase kBoxMistakes[] = {
    {"load_without_wait", load_without_wait},
    {"load_overwritten", load_overwritten},
    {"load_into_read", load_into_read},
    {"load_into_load", load_into_load},
    {"load_source_changed", load_source_changed},
    {"load_of_stored", load_of_stored},
    {"load_never_awaited", load_never_awaited},
    {"load_expects", load_expects},
    {"load_misaligned", load_misaligned},
    {"load_past_end", load_past_end},
    {"load_wrong_rank", load_wrong_rank},
    {"prefetch_of_none", prefetch_of_none},
    {"map_elsewhere", map_elsewhere},
    {"multicast_outside", multicast_outside},
    {"multicast_into_read", multicast_into_read},
    {"store_without_fence", store_without_fence},
    {"store_fenced_by_one", store_fenced_by_one},
    {"store_fenced_late", store_fenced_late},
    {"store_written_after_fence", store_written_after_fence},
    {"store_without_barrier", store_without_barrier},
    {"store_of_unwritten", store_of_unwritten},
    {"store_source_changed", store_source_changed},
    {"store_source_rewritten", store_source_rewritten},
    {"store_wait_short_by_one", store_wait_short_by_one},
    {"write_wait_short_by_one", write_wait_short_by_one},
    {"store_never_awaited", store_never_awaited},
    {"store_never_committed", store_never_committed},
    {"store_read_back", store_read_back},
    {"store_twice", store_twice},
    {"bulk_multiples", bulk_multiples},
    {"bulk_to_input", bulk_to_input},
    {"sums_in_turn", sums_in_turn},
    {"bulk_add_to_unwritten", bulk_add_to_unwritten},
    {nullptr, nullptr},
};
