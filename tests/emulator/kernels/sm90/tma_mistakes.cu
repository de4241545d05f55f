// What goes wrong around bulk copies: each mistake beside the same kernel without it.
#include "barrier.h"
#include "device/cluster.h"
#include "device/semaphore.h"
#include "device/tma.h"

namespace {

__device__ gk::Coordinates<2> box_of(const Case& p) { return {{p.at[0], p.at[1]}}; }

// The map is of a (rows, 32) fp32 tensor, the box 32 rows of it, 4,096 bytes. One warp.
__device__ void start_load(const Case& p, unsigned bytes) {
    uint64_t* bar = barrier_of(p);
    make_barrier(bar);
    __syncthreads();
    if (threadIdx.x == 0) {
        gk::mbarrier_arrive_expect_tx(bar, bytes);
        gk::tma_load(arena(), &p.map, bar, box_of(p));  // start_load
    }
}

__device__ void give(const Case& p) {
    for (int i = 0; i < 32; ++i) {
        p.b[32 * i + static_cast<int>(threadIdx.x)] =
            arena()[32 * i + static_cast<int>(threadIdx.x)];  // give
    }
}

GK_CASE(load_without_wait) {
    start_load(p, 4096);
    __syncthreads();
    if (!p.broken) gk::mbarrier_wait(barrier_of(p), 0);
    give(p);  // load_without_wait
    gk::mbarrier_wait(barrier_of(p), 0);
}

GK_CASE(load_overwritten) {
    start_load(p, 4096);
    __syncthreads();
    if (!p.broken) gk::mbarrier_wait(barrier_of(p), 0);
    arena()[threadIdx.x] = 1.0f;  // load_overwritten
    gk::mbarrier_wait(barrier_of(p), 0);
    give(p);
}

// The stage is loaded again while others may still read it.
GK_CASE(load_into_read) {
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
GK_CASE(load_into_load) {
    start_load(p, 8192);
    if (threadIdx.x == 0) {
        float* to = arena() + (p.broken ? 0 : 1024);
        gk::tma_load(to, &p.map, barrier_of(p), box_of(p));  // load_into_load
    }
    gk::mbarrier_wait(barrier_of(p), 0);
    give(p);
}

// b is the map's tensor, of 64 rows.
GK_CASE(load_source_changed) {
    start_load(p, 4096);
    if (!p.broken) gk::mbarrier_wait(barrier_of(p), 0);
    if (threadIdx.x == 0) p.b[33] += 1.0f;
    gk::mbarrier_wait(barrier_of(p), 0);
}

// b is the map's tensor, of 64 rows.
GK_CASE(load_of_stored) {
    if (p.broken) p.b[33 + threadIdx.x] = 2.0f;  // load_of_stored
    gk::fence_proxy_async();
    __syncthreads();
    start_load(p, 4096);
    gk::mbarrier_wait(barrier_of(p), 0);
}

GK_CASE(load_never_awaited) {
    start_load(p, 4096);
    if (!p.broken) gk::mbarrier_wait(barrier_of(p), 0);
}

// `broken`: how many times 16 bytes the phase expects too much
GK_CASE(load_expects) {
    start_load(p, 4096u + 16u * static_cast<unsigned>(p.broken));
    gk::mbarrier_wait(barrier_of(p), 0);  // load_expects
    give(p);
}

// The barrier of a thread that loads these bytes alone.
__device__ uint64_t* expecting(const Case& p, unsigned bytes) {
    uint64_t* bar = barrier_of(p);
    make_barrier(bar);
    gk::mbarrier_arrive_expect_tx(bar, bytes);
    return bar;
}

GK_CASE(load_misaligned) {
    if (threadIdx.x != 0) return;
    uint64_t* bar = expecting(p, 4096);
    gk::tma_load(gk::shared_memory() + p.broken, &p.map, bar, box_of(p));  // load_misaligned
    gk::mbarrier_wait(bar, 0);
}

GK_CASE(load_past_end) {
    if (threadIdx.x != 0) return;
    uint64_t* bar = expecting(p, 4096);
    gk::tma_load(arena() + (p.broken ? 128 : 0), &p.map, bar, box_of(p));  // load_past_end
    gk::mbarrier_wait(bar, 0);
}

GK_CASE(load_wrong_rank) {
    if (threadIdx.x != 0) return;
    uint64_t* bar = expecting(p, 4096);
    if (p.broken) {
        gk::tma_load(arena(), &p.map, bar, gk::Coordinates<3>{{0, 0, 0}});  // load_wrong_rank
    } else {
        gk::tma_load(arena(), &p.map, bar, box_of(p));
    }
    gk::mbarrier_wait(bar, 0);
}

GK_CASE(prefetch_of_none) {
    if (threadIdx.x != 0) return;
    auto other = reinterpret_cast<const gk::TensorMap*>(&p.a);
    gk::tma_prefetch(p.broken ? other : &p.map);  // prefetch_of_none
}

GK_CASE(map_elsewhere) {
    if (threadIdx.x != 0) return;
    auto other = reinterpret_cast<const gk::TensorMap*>(p.a);
    gk::tma_prefetch(p.broken ? other : &p.map);  // map_elsewhere
}

// Clusters of 2.
GK_CASE(multicast_outside) {
    uint64_t* bar = barrier_of(p);
    make_barrier(bar);
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
GK_CASE(multicast_into_read) {
    uint64_t* bar = barrier_of(p);
    make_barrier(bar);
    arena()[threadIdx.x] = 1.0f;
    __syncwarp();
    p.b[32 * blockIdx.x + threadIdx.x] = arena()[31 - threadIdx.x];
    if (p.broken) {
        gk::cluster_arrive();
        p.b[32 * blockIdx.x + threadIdx.x] = arena()[threadIdx.x];  // late
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

__device__ void fill_and_publish() {
    fill();  // published
    gk::fence_proxy_async();
    __syncthreads();
}

// The box, as a group of its own.
__device__ void store(const Case& p, int rows_further = 0) {
    gk::tma_store(&p.map, arena(), gk::Coordinates<2>{{p.at[0], p.at[1] + rows_further}});  // store
    gk::bulk_commit();
}

__device__ void store_and_wait(const Case& p) {
    store(p);  // store_and_wait
    gk::bulk_wait_read<0>();
}

// Broken: for the reads of shared memory alone.
__device__ void wait_for_writes(const Case& p) {
    if (p.broken) {
        gk::bulk_wait_read<0>();
    } else {
        gk::bulk_wait<0>();
    }
}

GK_CASE(store_without_fence) {
    fill();
    if (!p.broken) gk::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    store_and_wait(p);  // store_without_fence
}

// Who stores has fenced, and those who wrote have not.
GK_CASE(store_fenced_by_one) {
    fill();
    if (!p.broken || threadIdx.x == 0) gk::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    store_and_wait(p);  // store_fenced_by_one
}

// The fence of the one who wrote comes after the barrier: before the store, as it happens.
GK_CASE(store_fenced_late) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < 1024; ++i) arena()[i] = 1.0f;  // filled alone
        if (!p.broken) gk::fence_proxy_async();
    }
    __syncthreads();
    if (threadIdx.x == 0 && p.broken) gk::fence_proxy_async();
    if (threadIdx.x != 15) return;
    store_and_wait(p);  // store_fenced_late
}

GK_CASE(store_written_after_fence) {
    fill();
    gk::fence_proxy_async();
    if (p.broken) arena()[threadIdx.x] = 1.0f;  // after the fence
    __syncthreads();
    if (threadIdx.x != 0) return;
    store_and_wait(p);  // store_written_after_fence
}

GK_CASE(store_without_barrier) {
    fill();
    gk::fence_proxy_async();
    if (!p.broken) __syncthreads();
    if (threadIdx.x != 31) return;
    store_and_wait(p);  // store_without_barrier
}

GK_CASE(store_of_unwritten) {
    if (!p.broken) fill();
    gk::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    store_and_wait(p);  // store_of_unwritten
}

// The storing thread itself writes the next tile too soon.
GK_CASE(store_source_changed) {
    fill_and_publish();
    if (threadIdx.x != 0) return;
    store(p);  // source changed
    if (!p.broken) gk::bulk_wait_read<0>();
    arena()[5] = -1.0f;
    gk::bulk_wait_read<0>();  // store_source_changed
}

// Another thread does, after a barrier which the wait should precede, and writes what was there.
GK_CASE(store_source_rewritten) {
    fill_and_publish();
    if (threadIdx.x == 0) {
        store(p);  // source rewritten
        if (!p.broken) gk::bulk_wait_read<0>();
    }
    __syncthreads();
    arena()[threadIdx.x] = static_cast<float>(threadIdx.x);  // rewritten
    if (threadIdx.x == 0) gk::bulk_wait_read<0>();  // store_source_rewritten
}

GK_CASE(store_wait_short_by_one) {
    fill_and_publish();
    if (threadIdx.x != 0) return;
    store(p);  // of the older group
    store(p, 32);  // of the newer group
    gk::bulk_wait_read<1>();
    if (!p.broken) gk::bulk_wait_read<0>();
}

// As above, with the other kind of wait.
GK_CASE(write_wait_short_by_one) {
    fill_and_publish();
    if (threadIdx.x != 0) return;
    store(p);
    store(p, 32);  // the newer store
    gk::bulk_wait<1>();
    if (!p.broken) gk::bulk_wait<0>();
}

GK_CASE(store_never_awaited) {
    fill_and_publish();
    if (threadIdx.x != 0) return;
    store(p);  // store_never_awaited
    if (!p.broken) gk::bulk_wait_read<0>();
}

GK_CASE(store_never_committed) {
    fill_and_publish();
    if (threadIdx.x != 0) return;
    gk::tma_store(&p.map, arena(), box_of(p));  // store_never_committed
    if (!p.broken) gk::bulk_commit();
    gk::bulk_wait_read<0>();
}

// b is the map's tensor, of 32 rows.
GK_CASE(store_read_back) {
    fill_and_publish();
    if (threadIdx.x != 0) return;
    store(p);  // read back
    wait_for_writes(p);
    arena()[0] = p.b[0];  // store_read_back
}

GK_CASE(store_twice) {
    fill_and_publish();
    if (threadIdx.x != 0) return;
    store(p, p.broken ? 0 : 32 * static_cast<int>(blockIdx.x));  // store_twice
    gk::bulk_wait<0>();
}

// ---- contiguous bytes: a (32, 32) in, b likewise out; at: {bytes, global offset, shared offset}
GK_CASE(bulk_multiples) {
    if (threadIdx.x != 0) return;
    const unsigned bytes = p.broken ? static_cast<unsigned>(p.at[0]) : 512u;
    auto from = reinterpret_cast<const unsigned char*>(p.a) + (p.broken ? p.at[1] : 0);
    unsigned char* to = gk::shared_memory() + (p.broken ? p.at[2] : 0);
    uint64_t* bar = expecting(p, bytes);
    gk::bulk_load(to, from, bytes, bar);  // bulk_multiples
    gk::mbarrier_wait(bar, 0);
    gk::bulk_store(p.b, gk::shared_memory(), bytes);
    gk::bulk_commit();
    gk::bulk_wait_read<0>();
}

GK_CASE(bulk_to_input) {
    fill_and_publish();
    if (threadIdx.x != 0) return;
    gk::bulk_store(p.broken ? p.a : p.b, arena(), 512);  // bulk_to_input
    gk::bulk_commit();
    gk::bulk_wait_read<0>();
}

// b: 1,024 sums, then a semaphore, all zeros before. Two CTAs add in turn.
GK_CASE(sums_in_turn) {
    fill_and_publish();
    if (threadIdx.x != 0) return;
    auto flag = reinterpret_cast<int*>(p.b) + 1024;
    gk::semaphore_wait(flag, static_cast<int>(blockIdx.x));
    gk::bulk_reduce_add(p.b, arena(), 4096);  // sums_in_turn
    gk::bulk_commit();
    wait_for_writes(p);
    gk::semaphore_release(flag, 1);  // released early
}

// b is never written before.
GK_CASE(bulk_add_to_unwritten) {
    fill_and_publish();
    if (threadIdx.x != 0) return;
    if (!p.broken) {
        gk::bulk_store(p.b, arena(), 512);
        gk::bulk_commit();
        gk::bulk_wait<0>();
    }
    gk::bulk_reduce_add(p.b, arena(), 512);  // bulk_add_to_unwritten
    gk::bulk_commit();
    gk::bulk_wait_read<0>();
}

}  // namespace
