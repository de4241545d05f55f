// Clusters: each other's shared memory, their barrier, arrivals at each other's mbarriers; counters
// that order CTAs. `broken` is the number of a mistake.
#include "barrier.h"
#include "device/cluster.h"
#include "device/semaphore.h"
#include "device/vector.h"

namespace {

__device__ unsigned index() { return blockIdx.x * blockDim.x + threadIdx.x; }

enum ExchangeMistake {
    kNoFirstSync = 1,
    kNoLastSync,
    kOwnBarrierOnly,
    kArrivesTwice,
    kWaitsFirst,
    kNoSuchRank,
    kMapsGlobal,
    kPastEnd,
    kOneMoreSync,
    kDiverges,
    kUnwritten,
};

// a, b (ctas, threads): each CTA gives out what the next one of its cluster, of n, has read, and
// leaves a 1 there for it.
GK_CASE(exchange) {
    const unsigned i = threadIdx.x, rank = gk::cluster_rank(), next = (rank + 1) % unsigned(p.n);
    if (p.broken == kOwnBarrierOnly) gk::cluster_sync();
    if (p.broken != kUnwritten || rank == 0) arena()[i] = p.a[index()];  // own part
    if (p.broken == kWaitsFirst) gk::cluster_wait();  // waits first
    if (p.broken == kOwnBarrierOnly) {
        __syncthreads();
    } else if (p.broken == kDiverges) {
        if (i < 16) {
            gk::cluster_sync();  // low lanes arrive
        } else {
            gk::cluster_sync();  // high lanes arrive
        }
    } else if (p.broken != kNoFirstSync) {
        gk::cluster_sync();
    }
    const float* mine = p.broken == kMapsGlobal ? p.a : arena() + (p.broken == kPastEnd ? 0 : i);
    const unsigned whose = p.broken == kNoSuchRank ? unsigned(p.n) : next;
    const float* there = gk::cluster_map(mine, whose);  // mapped
    const float value = there[p.broken == kPastEnd ? blockDim.x * 2 : 0];  // of the next
    *gk::cluster_map(arena() + blockDim.x + i, next) = 1.0f;  // left there
    if (p.broken == kArrivesTwice) gk::cluster_arrive();
    if (p.broken != kNoLastSync) gk::cluster_sync();  // last sync
    if (p.broken == kOneMoreSync && i == 0 && rank == 0) __syncthreads();  // not alone
    if (p.broken == kOneMoreSync && (i != 0 || rank != 0)) gk::cluster_sync();  // one more
    p.b[index()] = value + (p.broken == kNoLastSync ? 0.0f : arena()[blockDim.x + i] - 1.0f);
}

// The same with work between arriving and waiting, which the others do not see.
GK_CASE(split) {
    const unsigned i = threadIdx.x, next = (gk::cluster_rank() + 1) % unsigned(p.n);
    float* own = arena() + i;
    if (!p.broken) *own = p.a[index()];
    gk::cluster_arrive();
    if (p.broken) *own = p.a[index()];  // too late
    arena()[blockDim.x + i] = 0.0f;
    gk::cluster_wait();
    const float value = *gk::cluster_map(own, next);  // after waiting
    gk::cluster_arrive();
    p.b[index()] = value;
    gk::cluster_wait();
}

enum ArrivalMistake {
    kFenceForgotten = 1,
    kReturnsFirst,
    kReleasedBeforeReading,
};

// a, b (2, threads), clusters of 2: CTA 1 reads what CTA 0 holds, and says so at CTA 0's mbarrier
// before that one overwrites it. c (2,) out: what is there at the end.
GK_CASE(remote_arrival) {
    const unsigned i = threadIdx.x, rank = gk::cluster_rank();
    auto bar = reinterpret_cast<uint64_t*>(arena() + blockDim.x);
    if (i == 0) {
        gk::mbarrier_init(bar, blockDim.x);  // unfenced
        if (p.broken != kFenceForgotten) gk::mbarrier_init_fence();
    }
    arena()[i] = p.a[index()];
    gk::cluster_sync();
    if (rank == 1) {
        if (p.broken == kReleasedBeforeReading) gk::mbarrier_arrive_cluster(bar, 0);
        p.b[i] = *gk::cluster_map(arena() + i, 0);  // reads there
        if (p.broken != kReleasedBeforeReading) gk::mbarrier_arrive_cluster(bar, 0);  // arrives there
    } else if (p.broken != kReturnsFirst) {
        gk::mbarrier_wait(bar, 0);
        arena()[i] = -1.0f;  // overwritten there
        __syncthreads();
        p.b[blockDim.x + i] = arena()[i ^ 1];
    }
}

// The same by one thread, after a barrier of its CTA.
GK_CASE(remote_arrival_by_one) {
    const unsigned i = threadIdx.x, rank = gk::cluster_rank();
    auto bar = reinterpret_cast<uint64_t*>(arena() + blockDim.x);
    make_barrier(bar);
    arena()[i] = p.a[index()];
    gk::cluster_sync();
    if (rank == 1) {
        p.b[i] = *gk::cluster_map(arena() + i, 0);  // read by all there
        if (!p.broken) __syncthreads();
        if (i == 0) gk::mbarrier_arrive_cluster(bar, 0);
    } else {
        gk::mbarrier_wait(bar, 0);
        arena()[i] = -1.0f;  // overwritten after one arrival
        p.b[blockDim.x + i] = arena()[i];
    }
    gk::cluster_sync();
}

// c (2,): an int32, whose turn it is, and how many have had theirs; b (ctas,) out: how many before.
GK_CASE(turns_of_ctas) {
    if (threadIdx.x != 0) return;
    auto turn = static_cast<int*>(p.c);
    const unsigned mine = p.broken ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    gk::semaphore_wait(turn, int(mine));  // for its turn
    p.b[blockIdx.x] = atomicAdd(static_cast<float*>(p.c) + 1, 1.0f);
    gk::semaphore_release(turn, 1);
}

// b (ctas, 2) out
GK_CASE(ranks) {
    if (threadIdx.x == 0) {
        p.b[2 * blockIdx.x] = float(gk::cluster_rank());
        p.b[2 * blockIdx.x + 1] = float(blockIdx.x);
    }
}

}  // namespace
