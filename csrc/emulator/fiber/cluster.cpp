// What the CTAs of a cluster do together: barrier.cluster, and access to each other's memory.
#include "emulator/fiber/cluster.h"

#include <algorithm>

#include "runtime/launch.h"
#include "emulator/fiber/grid.h"
#include "emulator/memory/memory.h"

namespace gk::emulator {
namespace {

unsigned threads_alive(const Cluster& cluster) {
    unsigned alive = 0;
    for (const Cta* cta : cluster.ctas) alive += cta->alive;
    return alive;
}

// When all threads have arrived they go on. A thread that only arrived learns of the others when it
// waits.
void complete(Cluster& cluster) {
    ClusterBarrier& barrier = cluster.barrier;
    if (barrier.arrived == 0 || barrier.arrived < threads_alive(cluster)) return;
    if (barrier.split) {
        std::swap(barrier.past, barrier.completed);
        for (Thread* thread : barrier.waiting) take_past(barrier.completed, *thread);
    } else {
        order_cluster(cluster);
        barrier.completed.forget();
    }
    barrier.past.forget();
    barrier.arrived = 0;
    barrier.split = false;
    barrier.paths.clear();
    for (Thread* thread : barrier.waiting) {
        thread->arrived = false;
        wake(*thread);
    }
    barrier.waiting.clear();
    ++barrier.times;
}

// `leaves`: the thread does something else before it waits.
void arrive(const char* what, bool leaves) {
    need_hopper(what);
    Thread& self = *running;
    Cluster& cluster = *self.cta->cluster;
    ClusterBarrier& barrier = cluster.barrier;
    if (self.arrived) fail(std::string(what) + " comes again with no cluster_wait in between");
    // The instruction is .aligned: a warp's lanes come from one place.
    barrier.paths.resize(cluster.clock.engines / kWarp);
    uint64_t& path = barrier.paths[self.member() / kWarp];
    const uint64_t mine = path_here();
    if (path != 0 && path != mine) {
        fail(std::string(what) + " diverges: other lanes of the same warp came by another way");
    }
    path = mine;
    self.arrived = true;
    self.arrived_at = barrier.times;
    ++barrier.arrived;
    if (leaves && !barrier.split) {
        // The threads that wait so far have done nothing since they arrived.
        barrier.split = true;
        for (Thread* thread : barrier.waiting) leave_past(barrier.past, *thread, true);
    }
    if (barrier.split) leave_past(barrier.past, self, true);
}

void wait_for_others(const char* what) {
    Thread& self = *running;
    Cluster& cluster = *self.cta->cluster;
    ClusterBarrier& barrier = cluster.barrier;
    if (!self.arrived) fail(std::string(what) + " comes before this thread's cluster_arrive");
    if (barrier.times != self.arrived_at) {
        take_past(barrier.completed, self);
        self.arrived = false;
        return;
    }
    barrier.waiting.push_back(&self);
    const unsigned times = barrier.times;
    complete(cluster);
    if (barrier.times != times) return;
    wait({what, path_here()}, [&barrier, &cluster] {
        return "(" + std::to_string(barrier.arrived) + " of " +
               std::to_string(threads_alive(cluster)) + " threads have arrived)";
    });
}

}  // namespace

Cta& cta_of_rank(unsigned rank, const char* what) {
    const Cluster& cluster = *running->cta->cluster;
    if (rank >= cluster.ctas.size()) {
        fail(std::string(what) + " names CTA " + std::to_string(rank) + " of a cluster of " +
             std::to_string(cluster.ctas.size()));
    }
    return *cluster.ctas[rank];
}

unsigned cluster_rank() {
    need_hopper("cluster_rank");
    return running->cta->rank;
}

void cluster_arrive() {
    arrive("cluster_arrive", true);
    complete(*running->cta->cluster);
}

void cluster_wait() {
    need_hopper("cluster_wait");
    wait_for_others("cluster_wait");
}

void cluster_sync() {
    arrive("cluster_sync", false);
    wait_for_others("cluster_sync");
}

void* cluster_map(const void* mine, unsigned rank) {
    need_hopper("cluster_map");
    const auto offset = size_t(static_cast<const unsigned char*>(mine) - shared_memory());
    if (offset >= launched->shared_bytes) {
        fail("cluster_map is given an address outside of its CTA's shared memory");
    }
    return cta_of_rank(rank, "cluster_map").shared + offset;
}

void cluster_without(Thread& thread) {
    if (thread.arrived) --thread.cta->cluster->barrier.arrived;
    complete(*thread.cta->cluster);
}

}  // namespace gk::emulator
