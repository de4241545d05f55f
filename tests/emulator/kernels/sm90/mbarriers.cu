// Rings of stages whose mbarriers are waited on, filled and released; registers that warpgroups pass
// to each other. `broken` is the number of a mistake.
#include "barrier.h"
#include "device/cluster.h"
#include "device/pipeline.h"
#include "device/tma.h"
#include "device/vector.h"
#include "device/warpgroup.h"

namespace {

constexpr int kStages = 2, kConsumers = 64, kFloats = 4 * kConsumers;  // of a stage
constexpr unsigned kBytes = kFloats * sizeof(float);

struct Ring {
    float stages[kStages][kFloats];
    uint64_t full[kStages], empty[kStages];
};

__device__ Ring& ring() { return *reinterpret_cast<Ring*>(gk::shared_memory()); }

enum Mistake {
    kWrongPhaseOfConsumer = 1,
    kWrongPhaseOfProducer,
    kExpectsTooMuch,
    kExpectsTooLittle,
    kReleasedTooEarly,
    kConsumerDoesNotWait,
    kNeverReleased,
    kProducerDoesNotWait,
    kOneArrivalTooMany,
    kNoInitFence,
    kNoBarrierAfterInit,
    kInitialisedTwice,
    kReadAsMemory,
    kLeftInFlight,
    kNotInitialised,
    kMisaligned,
    kNoSuchParity,
    kOverwritten,
};

__device__ void initialise(const Case& p) {
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            gk::mbarrier_init(&ring().full[stage], 1);  // initialised
            if (p.broken == kNotInitialised && stage > 0) break;
            gk::mbarrier_init(&ring().empty[stage],
                              p.broken == kNeverReleased ? kConsumers + 1 : kConsumers);
        }
        if (p.broken == kInitialisedTwice) gk::mbarrier_init(&ring().full[0], 1);  // initialised again
        if (p.broken != kNoInitFence) gk::mbarrier_init_fence();
    }
    if (p.broken != kNoBarrierAfterInit) __syncthreads();
}

__device__ const float* source(const Case& p, int tile) {
    return p.a + (int(blockIdx.x) * p.n + tile) * kFloats;
}

__device__ void produce(const Case& p) {
    gk::PipelineState<kStages> at;
    const unsigned expected = p.broken == kExpectsTooMuch     ? kBytes + 16
                              : p.broken == kExpectsTooLittle ? kBytes - 16
                                                              : kBytes;
    for (int tile = 0; tile < p.n; ++tile, at.advance()) {
        uint64_t *full = &ring().full[at.stage], *empty = &ring().empty[at.stage];
        const unsigned parity = p.broken == kWrongPhaseOfProducer ? at.phase : at.phase ^ 1;
        if (p.broken != kProducerDoesNotWait) gk::mbarrier_wait(empty, parity);
        gk::mbarrier_arrive_expect_tx(full, expected);  // expects
        gk::bulk_load(ring().stages[at.stage], source(p, tile), kBytes, full);  // fill of the ring
    }
}

__device__ void consume(const Case& p, int thread) {
    gk::PipelineState<kStages> at;
    const int tiles = p.broken == kLeftInFlight ? p.n - 1 : p.n;
    for (int tile = 0; tile < tiles; ++tile, at.advance()) {
        uint64_t *full = &ring().full[at.stage], *empty = &ring().empty[at.stage];
        const unsigned parity = p.broken == kNoSuchParity           ? 2
                                : p.broken == kWrongPhaseOfConsumer ? at.phase ^ 1
                                                                    : at.phase;
        if (p.broken != kConsumerDoesNotWait || thread != 0) {
            gk::mbarrier_wait(full, parity);  // wait for full
        }
        if (p.broken == kReleasedTooEarly) gk::mbarrier_arrive(empty);
        if (p.broken == kOneArrivalTooMany && thread == 0) gk::mbarrier_arrive(full);
        if (p.broken == kReadAsMemory) p.b[0] = float(*full);  // as memory
        if (p.broken == kOverwritten) *full = 0;  // overwritten mbarrier
        float* four = ring().stages[at.stage] + 4 * thread;
        gk::st128(p.b + (source(p, tile) - p.a) + 4 * thread, gk::ld128(four));  // use of the stage
        if (p.broken == kMisaligned) {
            gk::mbarrier_arrive(reinterpret_cast<uint64_t*>(four + 1));  // misaligned
        }
        if (p.broken != kReleasedTooEarly) gk::mbarrier_arrive(empty);  // release
    }
}

// a, b (ctas, n, 256), n tiles a CTA: 64 consumers copy what a thread of another warp lets through.
GK_CASE(pipeline) {
    initialise(p);
    const int thread = int(threadIdx.x) - 32;
    if (threadIdx.x == 0) produce(p);
    if (thread >= 0) consume(p, thread);
}

// The same where consumers release after a barrier of their own, by one thread: what it knows of the
// others it passes on.
GK_CASE(released_by_one) {
    for (int stage = 0; stage < kStages; ++stage) {
        make_barrier(&ring().full[stage]);
        make_barrier(&ring().empty[stage]);
    }
    __syncthreads();
    if (threadIdx.x == 0) produce(p);
    if (threadIdx.x < 32) return;
    gk::PipelineState<kStages> at;
    const int thread = int(threadIdx.x) - 32;
    for (int tile = 0; tile < p.n; ++tile, at.advance()) {
        gk::mbarrier_wait(&ring().full[at.stage], at.phase);
        gk::st128(p.b + (source(p, tile) - p.a) + 4 * thread,
                  gk::ld128(ring().stages[at.stage] + 4 * thread));  // used by all
        if (!p.broken) gk::named_barrier_sync(1, kConsumers);
        if (thread == 0) gk::mbarrier_arrive(&ring().empty[at.stage]);
    }
}

// a, b (threads,): one thread of each warp waits, and the others learn of it by the warp's barrier.
GK_CASE(waited_by_one) {
    float* data = ring().stages[0];
    make_barrier(&ring().full[0]);
    __syncthreads();
    if (threadIdx.x == 0) {
        gk::mbarrier_arrive_expect_tx(&ring().full[0], blockDim.x * 4);
        gk::bulk_load(data, p.a, blockDim.x * 4, &ring().full[0]);
    }
    if (threadIdx.x % 32 == 0) gk::mbarrier_wait(&ring().full[0], 0);
    if (!p.broken) __syncwarp();
    p.b[threadIdx.x] = data[threadIdx.x];  // not waited
}

// The same for all threads by a barrier of the CTA, or with n of the cluster. Broken: all read before
// anybody has waited.
GK_CASE(waited_by_first) {
    float* data = ring().stages[0];
    uint64_t* bar = &ring().full[0];
    make_barrier(bar);
    if (threadIdx.x == 0) {
        gk::mbarrier_arrive_expect_tx(bar, blockDim.x * 4);
        gk::bulk_load(data, p.a, blockDim.x * 4, bar);
        if (!p.broken) gk::mbarrier_wait(bar, 0);
    }
    if (p.n) {
        gk::cluster_sync();
    } else {
        __syncthreads();
    }
    p.b[threadIdx.x] = data[threadIdx.x];  // before the first has waited
    gk::mbarrier_wait(bar, 0);
}

// a, b (threads,): an mbarrier between ordinary stores and loads. Two rounds, one arrival a thread.
GK_CASE(arrivals) {
    float* data = ring().stages[0];
    uint64_t* bar = &ring().full[0];
    if (threadIdx.x == 0) gk::mbarrier_init(bar, blockDim.x);
    __syncthreads();
    const unsigned other = threadIdx.x ^ 33;
    float value = p.a[threadIdx.x];
    for (unsigned round = 0; round < 2; ++round) {
        data[128 * round + threadIdx.x] = value;  // stored
        gk::mbarrier_arrive(bar);
        if (!p.broken) gk::mbarrier_wait(bar, round);
        value = 1 + data[128 * round + other];  // loaded
    }
    p.b[threadIdx.x] = value;
}

enum PassingMistake {
    kPartOfWarpgroup = 1,
    kMoreThanThereIs,
    kGivesBackMore,
    kAsksForFewer,
    kOneLane,
};

// b (threads,) out. 384 threads start with 168 registers each: 24 and two times 240 are as many.
__global__ void __launch_bounds__(384, 1) registers(const __grid_constant__ Case p) {
    const unsigned group = threadIdx.x / 128, warp = threadIdx.x / 32;
    if (group == 0) {
        if (p.broken == kGivesBackMore) {
            gk::warpgroup_reg_dealloc<200>();  // gives back more
        } else if (p.broken == kAsksForFewer) {
            gk::warpgroup_reg_alloc<24>();  // asks for fewer
        } else if (p.broken == kOneLane) {
            if (threadIdx.x == 0) gk::warpgroup_reg_dealloc<24>();  // one lane
        } else if (p.broken != kPartOfWarpgroup || warp != 3) {
            gk::warpgroup_reg_dealloc<24>();
        }
    } else if (p.broken == kMoreThanThereIs) {
        gk::warpgroup_reg_alloc<248>();  // more than there is
    } else if (p.broken != kPartOfWarpgroup) {
        gk::warpgroup_reg_alloc<240>();
    }
    p.b[threadIdx.x] = float(group);
}

const NamedCase registers_case{"registers", registers};

}  // namespace
