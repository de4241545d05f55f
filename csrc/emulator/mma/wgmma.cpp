// Products of a warpgroup. A thread that issues a product goes on. When all 128 threads have issued
// it, the emulator keeps a copy of its operands in shared memory. When the first thread waits for
// it, the operands must still be the same, and the product is computed. Until then the accumulators
// hold a pattern, a NaN, and nobody may touch them.
//
// The warpgroup's threads must come to the same steps, because all these instructions are .aligned.
#include "emulator/mma/wgmma.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <string>

#include "runtime/launch.h"
#include "emulator/mma/descriptor.h"
#include "emulator/fiber/grid.h"
#include "emulator/memory/memory.h"
#include "emulator/mma/wgmma_sum.h"

namespace gk::emulator {
namespace {

constexpr unsigned kThreads = 128;
constexpr uint32_t kPoison = 0x7fd0dead;
constexpr uint32_t kPoisonPair[2] = {kPoison, kPoison};
constexpr unsigned kReader = 31;  // the lane that checks whether its warp may read the operands
constexpr const char* kWait = "wgmma.wait_group";

// An instruction of the warpgroup that some of its threads have come to.
struct Step {
    const char* what;
    uint64_t path;
    const void* pc;
    unsigned thread;  // the first that came
    unsigned passed;  // how many threads came
};

struct Product {
    WgmmaForm form{};
    uint64_t a = 0, b = 0;
    bool from_registers = false, accumulate = false;
    bool opens = false;  // whether it is the first product on its accumulators
    std::shared_ptr<std::vector<float>> sums;  // [64][n], of all products on the same accumulators
    unsigned issued = 0, waited = 0;           // how many threads did so
    std::vector<Segment> a_segments, b_segments;
    std::vector<uint16_t> a_bits, b_bits;  // as they were when the product was issued
    Epoch read = 0;                        // the engine's read, over when this was waited for
};

// A thread's accumulators, which products may still write.
struct InFlight {
    float* acc;
    int n;
    std::shared_ptr<std::vector<float>> sums;
    size_t last;  // the last product on them
};

// What one thread has done.
struct Progress {
    size_t steps = 0, issued = 0, waited = 0;
    std::vector<size_t> ends;  // where each group that was not waited for ends, in products
    std::vector<InFlight> in_flight;
};

// A list whose elements are numbered from the CTA's start; the first `gone` of them have been
// dropped.
template <class T>
struct Numbered {
    std::deque<T> list;
    size_t gone = 0;
    T& operator[](size_t number) { return list[number - gone]; }
    bool has(size_t number) const { return number < gone + list.size(); }
    void forget_first() {
        list.pop_front();
        ++gone;
    }
};

}  // namespace

struct Warpgroup {
    Progress threads[kThreads];
    Numbered<Step> steps;
    Numbered<Product> products;
    size_t computed = 0;
};

namespace {

Progress& progress(Warpgroup& group) { return group.threads[running->index % kThreads]; }

// The running thread's warpgroup, whose next instruction this is. Fails if other threads came to
// another instruction.
Warpgroup& come_to(const char* what, const void* pc) {
    Thread& self = *running;
    Cta& cta = *self.cta;
    const unsigned number = self.index / kThreads;
    if ((number + 1) * kThreads > cta.threads) {
        fail(std::string(what) + " needs a warpgroup, four whole warps, and the CTA has " +
             std::to_string(cta.threads) + " threads");
    }
    if (cta.warpgroups.size() <= number) cta.warpgroups.resize(number + 1);
    if (cta.warpgroups[number] == nullptr) cta.warpgroups[number] = std::make_shared<Warpgroup>();
    Warpgroup& group = *cta.warpgroups[number];
    Progress& mine = progress(group);
    const uint64_t path = path_here();
    if (!group.steps.has(mine.steps)) group.steps.list.push_back({what, path, pc, self.index, 0});
    Step& step = group.steps[mine.steps++];
    if (step.path != path || step.what != what) {
        fail(std::string(what) + " diverges: thread " + std::to_string(step.thread) +
             " of the same warpgroup is in " + step.what + " at " + lines({step.pc}));
    }
    ++step.passed;
    while (!group.steps.list.empty() && group.steps.list.front().passed == kThreads) {
        group.steps.forget_first();
    }
    return group;
}

size_t stack_offset(const void* address, size_t bytes) {
    const Fiber& fiber = running->fiber;
    const size_t offset = size_t(static_cast<const char*>(address) - fiber.stack_begin());
    if (offset + bytes > size_t(fiber.stack_end() - fiber.stack_begin())) {
        fail("wgmma.mma_async has registers that are no variables of its thread");
    }
    return offset;
}

// Calls f(i, at) for each two neighbours i and i + 1 of the running thread's accumulators; `at` is
// where they lie in [64][n].
template <class F>
void for_pairs(int n, F&& f) {
    const unsigned thread = running->index % kThreads;
    const unsigned row = thread / kWarp * 16 + thread % kWarp / 4;
    const size_t first = row * size_t(n) + thread % 4 * 2, second = first + 8 * size_t(n);
    for (int tile = 0; tile < n / 8; ++tile) {
        f(4 * tile, first + size_t(8 * tile));
        f(4 * tile + 2, second + size_t(8 * tile));
    }
}

// The first thread defines the product, and the others must agree.
Product& issue(Warpgroup& group, const WgmmaForm& form, uint64_t a, bool from_registers, uint64_t b,
               bool accumulate) {
    const size_t number = progress(group).issued++;
    if (!group.products.has(number)) {
        Product product;
        product.form = form;
        product.a = a;
        product.b = b;
        product.from_registers = from_registers;
        product.accumulate = accumulate;
        if (from_registers) {
            product.a_bits.resize(64 * 16);
        } else {
            product.a_segments = segments_of("A", a, 64, form.a_mn);
        }
        product.b_segments = segments_of("B", b, form.n, form.b_mn);
        group.products.list.push_back(std::move(product));
    }
    Product& product = group.products[number];
    const char* differs = product.a != a                     ? "the descriptor of A"
                          : product.b != b                   ? "the descriptor of B"
                          : product.accumulate != accumulate ? "whether to accumulate"
                                                             : nullptr;
    if (differs) {
        fail(std::string("wgmma.mma_async: the warpgroup's threads do not agree on ") + differs);
    }
    return product;
}

// From here on the accumulators belong to the product.
void take_accumulators(Product& product, Progress& mine, float* acc) {
    const int n = product.form.n;
    const size_t bytes = size_t(n) / 2 * sizeof(float), offset = stack_offset(acc, bytes);
    Touched& touched = running->touched;
    const auto flight = std::find_if(mine.in_flight.begin(), mine.in_flight.end(),
                                     [&](const InFlight& f) { return f.acc == acc && f.n == n; });
    const bool opens = flight == mine.in_flight.end();
    if (opens && touched.in_flight(offset, bytes)) {
        fail("wgmma.mma_async has accumulators some of which a product of another shape, not "
             "waited for, has too");
    }
    if (product.issued == 0) {
        product.opens = opens;
        product.sums = opens ? std::make_shared<std::vector<float>>(size_t(64 * n)) : flight->sums;
    }
    if (opens != product.opens || (!opens && flight->sums != product.sums)) {
        fail("wgmma.mma_async diverges: the warpgroup's threads have different accumulators");
    }
    if (!opens) {
        flight->last = mine.issued - 1;
        return;
    }
    if (touched.since_fence(offset, bytes)) {
        fail("wgmma.mma_async has accumulators that were touched after the last wgmma_fence");
    }
    if (product.accumulate) {
        float* sums = product.sums->data();
        for_pairs(n, [&](int i, size_t at) { std::memcpy(sums + at, acc + i, 8); });
    }
    for (int i = 0; i < n / 2; ++i) std::memcpy(acc + i, &kPoison, sizeof kPoison);
    touched.set_in_flight(offset, bytes);
    mine.in_flight.push_back({acc, n, product.sums, mine.issued - 1});
}

void copy_registers(Product& product, const uint32_t* a) {
    const size_t bytes = 4 * sizeof *a, offset = stack_offset(a, bytes);
    if (running->touched.since_fence(offset, bytes)) {
        fail("wgmma.mma_async has registers of A that were touched after the last wgmma_fence");
    }
    const unsigned thread = running->index % kThreads;
    for (unsigned r = 0; r < 4; ++r) {
        const unsigned row = thread / kWarp * 16 + thread % kWarp / 4 + r % 2 * 8;
        std::memcpy(&product.a_bits[row * 16 + thread % 4 * 2 + r / 2 * 8], a + r, sizeof *a);
    }
}

// The number of the asynchronous engine's reader that stands for a warpgroup.
unsigned engine_of(const Thread& thread) {
    constexpr unsigned kMost = 1024 / kThreads;
    return kWriters + (thread.cta->rank * kMost + thread.index / kThreads) % (kEngines - kWriters);
}

// Checks what the running thread's warp reads: its 16 rows of A, and B in every fourth product.
void read_operands(Product& product, size_t number, const void* pc) {
    if (product.read == 0) product.read = engine_step(*running->cta->cluster, engine_of(*running));
    const unsigned char* shared = running->cta->shared;
    const unsigned warp = running->index % kThreads / kWarp;
    for (size_t i = 0; i < product.a_segments.size(); ++i) {
        if ((product.form.a_mn ? i % 4 : i / 16) != warp) continue;
        memory::async_read(shared + product.a_segments[i].offset, 32, pc, product.read);
    }
    if (number % 4 == warp) {
        for (const Segment& segment : product.b_segments) {
            memory::async_read(shared + segment.offset, 32, pc, product.read);
        }
    }
}

void check_unchanged(const char* name, const std::vector<Segment>& segments,
                     const std::vector<uint16_t>& bits) {
    static std::vector<uint16_t> now;
    copy_segments(now, running->cta->shared, segments);
    const size_t at = size_t(std::mismatch(now.begin(), now.end(), bits.begin()).first -
                             now.begin());
    if (at == now.size()) return;
    const Segment& segment = segments[at / 16];
    fail(std::string(name) + " of a wgmma.mma_async has changed before it was waited for, within " +
         "32 bytes from byte " + std::to_string(segment.offset) + " of shared memory on");
}

void compute(Product& product) {
    alignas(64) static float a[64 * 16], b[16 * 256];
    const WgmmaForm& form = product.form;
    if (!product.from_registers) check_unchanged("A", product.a_segments, product.a_bits);
    check_unchanged("B", product.b_segments, product.b_bits);
    to_rows(a, product.a_bits, form.a_mn, form.bf16);
    to_columns(b, product.b_bits, form.b_mn, form.bf16);
    std::vector<float>& sums = *product.sums;
    if (!product.accumulate) std::fill(sums.begin(), sums.end(), 0.0f);
    add_product(sums.data(), a, b, form.n);
}

// Writes the sums of products that were waited for to the thread's registers.
void give_accumulators(Progress& mine, size_t end) {
    for (size_t i = mine.in_flight.size(); i-- > 0;) {
        const InFlight flight = mine.in_flight[i];
        if (flight.last >= end) continue;
        mine.in_flight.erase(mine.in_flight.begin() + ptrdiff_t(i));
        const float* sums = flight.sums->data();
        bool poisoned = true;
        for_pairs(flight.n, [&](int i, size_t at) {
            poisoned &= std::memcmp(flight.acc + i, kPoisonPair, sizeof kPoisonPair) == 0;
            std::memcpy(flight.acc + i, sums + at, 8);
        });
        if (!poisoned) {
            fail("an accumulator of a wgmma.mma_async was written before it was waited for");
        }
        const size_t bytes = size_t(flight.n) / 2 * sizeof(float);
        running->touched.set_landed(stack_offset(flight.acc, bytes), bytes);
    }
}

}  // namespace

void wgmma(const WgmmaForm& form, float* acc, uint64_t a, const uint32_t* a_registers, uint64_t b,
           bool accumulate) {
    const void* pc = __builtin_return_address(0);
    Thread& self = *running;
    Warpgroup& group = come_to("wgmma.mma_async", pc);
    if (!self.touched.on()) fail("wgmma.mma_async comes before any wgmma_fence");
    Progress& mine = progress(group);
    const size_t number = mine.issued;
    Product& product = issue(group, form, a, a_registers != nullptr, b, accumulate);
    if (a_registers) copy_registers(product, a_registers);
    take_accumulators(product, mine, acc);
    if (self.lane() == kReader) read_operands(product, number, pc);
    if (++product.issued < kThreads) return;
    if (!a_registers) copy_segments(product.a_bits, self.cta->shared, product.a_segments);
    copy_segments(product.b_bits, self.cta->shared, product.b_segments);
    for (unsigned i = 0; i < kThreads; ++i) {
        Thread& other = *self.cta->fibers[self.index / kThreads * kThreads + i];
        if (other.waiting.what == kWait) wake(other);
    }
}

void wgmma_fence() {
    need_hopper("wgmma");
    come_to("wgmma.fence", __builtin_return_address(0));
    Thread& self = *running;
    if (!self.touched.on()) {
        self.touched.start(size_t(self.fiber.stack_end() - self.fiber.stack_begin()));
    }
    self.touched.fence();
}

void wgmma_commit() {
    Progress& mine = progress(come_to("wgmma.commit_group", __builtin_return_address(0)));
    mine.ends.push_back(mine.issued);
}

void wgmma_wait(int pending) {
    Thread& self = *running;
    Warpgroup& group = come_to(kWait, __builtin_return_address(0));
    Progress& mine = progress(group);
    if (mine.ends.size() <= size_t(pending)) return;
    const size_t groups = mine.ends.size() - size_t(pending), end = mine.ends[groups - 1];
    mine.ends.erase(mine.ends.begin(), mine.ends.begin() + ptrdiff_t(groups));
    if (end == mine.waited) return;
    while (group.products[end - 1].issued < kThreads) {
        wait({kWait, path_here(), 0, 0});
    }
    for (; group.computed < end; ++group.computed) compute(group.products[group.computed]);
    give_accumulators(mine, end);
    static Past past;
    past.forget();
    leave_engine(past, *self.cta->cluster, group.products[end - 1].read);
    take_past(past, self);
    for (; mine.waited < end; ++mine.waited) ++group.products[mine.waited].waited;
    while (!group.products.list.empty() && group.products.list.front().waited == kThreads) {
        group.products.forget_first();
    }
}

}  // namespace gk::emulator
