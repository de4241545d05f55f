// Loads by the tensor memory accelerator. A load is checked when a thread starts it: map,
// coordinates, addresses, source and destination. Its bytes arrive, and count on its barrier, when
// the asynchronous engine gets to it. Until then the destination holds NaNs that nobody may read.
#include "emulator/async/tma.h"

#include <cstring>
#include <string>

#include "emulator/async/asynchronous.h"
#include "emulator/async/bulk_checks.h"
#include "emulator/fiber/grid.h"
#include "emulator/memory/memory.h"
#include "emulator/memory/report.h"

namespace gk::emulator {
namespace {

constexpr int kPoison = 0xff;

// The load of one box: the CTAs that get it, each at the same offset and on its own barrier.
struct Load {
    const char* what;
    const void* pc;  // where it was started
    Box box;
    std::vector<unsigned char> image;
    std::vector<Cta*> targets;
    size_t barrier;
};

void land(const Load& load) {
    if (load_box(load.box) != load.image) {
        fail("the source of a " + std::string(load.what) + ", at " + lines({load.pc}) +
             ", has changed before it landed");
    }
    const size_t offset = load.box.offset, bytes = load.box.bytes;
    for (Cta* cta : load.targets) {
        if (cta->alive == 0) {
            fail("CTA " + text(cta->block) + " returned before a " + load.what + ", at " +
                 lines({load.pc}) + ", had written its shared memory");
        }
        std::memcpy(cta->shared + offset, load.image.data(), bytes);
        memory::bulk_landed(*cta, offset, bytes, mbarrier_writer(*cta, load.barrier));
        mbarrier_complete(*cta, load.barrier, unsigned(bytes));
    }
}

void start(const char* what, Box&& box, std::vector<Cta*>&& targets, const uint64_t* bar,
           const void* pc) {
    const size_t barrier = memory::shared_offset(Access::atomic, bar, sizeof *bar);
    for (const Row& row : box.rows) {
        memory::async_read_tensor(row.global, row.last - row.first, pc);
    }
    std::vector<unsigned char> image = load_box(box);
    for (Cta* cta : targets) {
        mbarrier_for_copy(*cta, barrier, what);
        memory::bulk_begin(*cta, box.offset, box.bytes, pc);
        std::memset(cta->shared + box.offset, kPoison, box.bytes);
    }
    later([load = Load{what, pc, std::move(box), std::move(image), std::move(targets), barrier}] {
        land(load);
    });
}

// The CTAs of the running thread's cluster whose bits are set in `mask`. Fails if one does not
// exist.
std::vector<Cta*> targets_of(unsigned mask) {
    if (mask == 0) fail("a tma_load_multicast to no CTA: its mask is 0");
    std::vector<Cta*> targets;
    for (unsigned rank = 0; mask >> rank != 0; ++rank) {
        if (mask >> rank & 1) targets.push_back(&cta_of_rank(rank, "tma_load_multicast"));
    }
    return targets;
}

}  // namespace

void tma_prefetch(const TensorMap* map) { checked_map("tma_prefetch", map); }

void tma_load(void* shared, const TensorMap* map, uint64_t* bar, const int* at, int rank) {
    Box box = checked_box("tma_load", Access::write, map, shared, at, rank);
    start("tma_load", std::move(box), {running->cta}, bar, __builtin_return_address(0));
}

void tma_load_multicast(void* shared, const TensorMap* map, uint64_t* bar, const int* at, int rank,
                        unsigned mask) {
    Box box = checked_box("tma_load_multicast", Access::write, map, shared, at, rank);
    start("tma_load_multicast", std::move(box), targets_of(mask), bar,
          __builtin_return_address(0));
}

void bulk_load(void* shared, const void* global, unsigned bytes, uint64_t* bar) {
    Box box = checked_bytes("bulk_load", Access::write, const_cast<void*>(global), shared, bytes);
    start("bulk_load", std::move(box), {running->cta}, bar, __builtin_return_address(0));
}

}  // namespace gk::emulator
