// Which memory an address belongs to, and what an error says about a wrong access.
#include "emulator/memory/memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>

#include "runtime/launch.h"
#include "emulator/memory/report.h"
#include "emulator/memory/shadow.h"

namespace gk::emulator::memory {
namespace {

struct Tensor {
    std::string name;
    const char* begin;
    size_t bytes;
    // Only outputs have a shadow; it begins at the multiple of 16 below `begin`. An input needs
    // none: nobody may write to it, and every byte in it was written.
    std::unique_ptr<Shadow> shadow;
    size_t offset(const char* address) const {
        return size_t(address - begin) + reinterpret_cast<uintptr_t>(begin) % 16;
    }
};

// Outputs come first: bytes that an input shares with an output are updated in place.
std::vector<Tensor> tensors;
size_t outputs = 0;
bool overlapping = false;
const Tensor* recent = nullptr;

std::vector<Shadow> arenas;  // of shared memory, by the CTA's slot
unsigned next_serial = 1;    // of the next cluster, counted over all launches
unsigned launch_serial = 1;  // of the first cluster of this launch

bool inside(const char* begin, size_t size, const char* address, size_t bytes) {
    const size_t offset = size_t(address - begin);
    return offset < size && bytes <= size - offset;
}

std::string counted(size_t count, const char* what) {
    return std::to_string(count) + " " + what + (count == 1 ? "" : "s");
}

const char* verb(Access access) {
    switch (access) {
        case Access::read: return "reads ";
        case Access::write: return "writes ";
        case Access::atomic: break;
    }
    return "updates ";
}

// How far an access of `bytes` at `address` reaches outside of [begin, begin + size).
size_t distance(const char* begin, size_t size, const char* address, size_t bytes) {
    const auto first = uintptr_t(begin), last = first + size, from = uintptr_t(address);
    if (from < first) return first - from;
    return from + bytes > last ? from + bytes - last : 0;
}

std::string outside(const std::string& name, const char* begin, size_t size, const char* address,
                    size_t bytes) {
    const auto first = uintptr_t(begin), last = first + size, from = uintptr_t(address);
    std::string text;
    if (from < first) {
        text = counted(first - from, "byte") + " before the start of " + name;
    } else if (from >= last) {
        text = counted(from - last, "byte") + " past the end of " + name;
    } else {
        text = "the last " + std::to_string(from + bytes - last) + " past the end of " + name;
    }
    return text + " (" + counted(size, "byte") + ")";
}

// "shared memory", with the CTA's index where it is another CTA's.
std::string shared_text(const Cta& cta) {
    return &cta == running->cta ? "shared memory" : "shared memory of CTA " + text(cta.block);
}

// The address belongs to nothing that this thread may touch. The error names what lies there or
// nearby.
[[noreturn]] void fail_outside(Access access, const char* address, size_t bytes) {
    constexpr size_t kNear = 1024 * 1024, kNull = 64 * 1024;
    const std::string sentence = verb(access) + counted(bytes, "byte") + ", ";
    if (uintptr_t(address) < kNull) {
        fail(sentence + counted(uintptr_t(address), "byte") + " past a null pointer");
    }
    const Cta& cta = *running->cta;
    for (const auto& fiber : cta.fibers) {
        const char* stack = fiber->fiber.stack_begin();
        if (inside(stack, size_t(fiber->fiber.stack_end() - stack), address, bytes)) {
            fail(sentence + "in local memory of thread " + std::to_string(fiber->index));
        }
    }
    size_t nearest = kNear + 1;
    std::string where = "far from every tensor of this call and from shared memory";
    const auto look = [&](const std::string& name, const char* begin, size_t size) {
        const size_t far = distance(begin, size, address, bytes);
        if (far >= nearest) return;
        nearest = far;
        where = outside(name, begin, size, address, bytes);
    };
    for (const Cta* other : cta.cluster->ctas) {
        look(shared_text(*other), reinterpret_cast<const char*>(other->shared),
             launched->shared_bytes);
    }
    for (const Tensor& tensor : tensors) look(tensor.name, tensor.begin, tensor.bytes);
    fail(sentence + where);
}

std::string byte_text(size_t offset, const std::string& of) {
    return "byte " + std::to_string(offset) + " of " + of;
}

[[noreturn]] void fail_finding(Access access, const Finding& finding, const std::string& where,
                               size_t bytes) {
    std::string sentence = verb(access) + counted(bytes, "byte") + " at " + where;
    const std::string other =
        finding.other ? name_of(finding.other) + " " + finding.did + " at " +
                            lines({unpack_place(finding.place)})
                      : "";
    switch (finding.fault) {
        case Fault::unwritten: sentence += ", which nobody has written"; break;
        case Fault::in_flight:
            if (finding.bulk) {
                sentence += ", which a bulk copy may still write that " +
                            name_of(finding.other) + " started at " +
                            lines({unpack_place(finding.place)}) +
                            " and that has not been waited for";
                break;
            }
            sentence += ", which a cp.async may still write: " + other +
                        ", and that thread has not waited for the copy";
            break;
        case Fault::unfenced:
            sentence += " by the asynchronous proxy, which " + other +
                        ", with no fence_proxy_async of that thread between";
            break;
        case Fault::mbarrier:
            sentence += ", which is an mbarrier since " + name_of(finding.other) + " was at " +
                        lines({unpack_place(finding.place)});
            break;
        case Fault::race:
            sentence += ", which " + other + ", with no barrier between";
            break;
        case Fault::none: break;
    }
    fail(sentence);
}

// Names a byte by its offset in the tensor's shadow.
std::string tensor_byte(size_t offset, const Tensor& tensor) {
    return byte_text(offset - tensor.offset(tensor.begin), tensor.name);
}

[[noreturn]] void fail_input(Access access, const Tensor& tensor, const char* address,
                             size_t bytes) {
    fail(verb(access) + counted(bytes, "byte") + " at " +
         byte_text(size_t(address - tensor.begin), tensor.name) + ", an input of the kernel");
}

void check_alignment(Access access, const char* address, size_t bytes, size_t alignment) {
    if (uintptr_t(address) % alignment == 0) return;
    fail(verb(access) + counted(bytes, "byte") + " at an address that is " +
         std::to_string(uintptr_t(address) % alignment) + " past a multiple of " +
         std::to_string(alignment));
}

const Tensor* find(const char* address, size_t bytes) {
    if (recent && inside(recent->begin, recent->bytes, address, bytes)) return recent;
    for (const Tensor& tensor : tensors) {
        if (inside(tensor.begin, tensor.bytes, address, bytes)) {
            if (!overlapping) recent = &tensor;
            return &tensor;
        }
    }
    return nullptr;
}

// The CTA whose arena holds the bytes: the running thread's own, or another one of its cluster.
// Null if there is none.
Cta* arena_of(const char* address, size_t bytes) {
    Cta& own = *running->cta;
    const auto in = [&](const Cta& cta) {
        return inside(reinterpret_cast<const char*>(cta.shared), launched->shared_bytes, address,
                      bytes);
    };
    if (in(own)) return &own;
    for (Cta* cta : own.cluster->ctas) {
        if (in(*cta)) return cta;
    }
    return nullptr;
}

void check(Access access, const void* pointer, size_t bytes, size_t alignment, const void* pc) {
    const auto address = static_cast<const char*>(pointer);
    Thread& thread = *running;
    Cta* cta = arena_of(address, bytes);
    const Tensor* tensor = cta ? nullptr : find(address, bytes);
    if (cta == nullptr && tensor == nullptr) {
        const char* stack = thread.fiber.stack_begin();
        if (inside(stack, size_t(thread.fiber.stack_end() - stack), address, bytes)) return;
        fail_outside(access, address, bytes);
    }
    check_alignment(access, address, bytes, alignment);
    if (tensor && !tensor->shadow) {
        if (access == Access::read) return;
        fail_input(access, *tensor, address, bytes);
    }
    if (cta && cta != thread.cta) reach(*cta, pc);
    Shadow& shadow = cta ? arenas[cta->slot] : *tensor->shadow;
    const size_t offset = cta ? size_t(address - reinterpret_cast<const char*>(cta->shared))
                              : tensor->offset(address);
    const Visitor visitor{&thread, cta != nullptr, launch_serial, pack_place(pc)};
    const Finding finding = shadow.touch(access, offset, bytes, visitor);
    if (finding.fault == Fault::none) return;
    const std::string where =
        cta ? byte_text(finding.offset, shared_text(*cta)) : tensor_byte(finding.offset, *tensor);
    fail_finding(access, finding, where, bytes);
}

// Nobody may touch the bytes until their holder lets them go.
void hold(Cta& cta, size_t offset, size_t bytes, Held by, const void* pc) {
    const Visitor visitor{running, true, launch_serial, pack_place(pc)};
    const Finding finding = arenas[cta.slot].hold(offset, bytes, by, visitor);
    if (finding.fault == Fault::none) return;
    fail_finding(Access::write, finding, byte_text(finding.offset, shared_text(cta)), bytes);
}

Finding read_by_engine(const void* shared, size_t bytes, const void* pc, Epoch engine) {
    const size_t offset = shared_offset(Access::read, shared, bytes);
    const Visitor visitor{running, true, launch_serial, pack_place(pc), engine};
    return arenas[running->cta->slot].read_by_engine(offset, bytes, visitor);
}

size_t natural(size_t bytes) { return bytes & (bytes - 1) ? 1 : std::min<size_t>(bytes, 16); }

}  // namespace

void declare(const char* name, const void* begin, size_t bytes, bool written) {
    if (bytes == 0) return;
    Tensor tensor{name, static_cast<const char*>(begin), bytes, nullptr};
    if (!written) tensor.shadow = std::make_unique<Shadow>(bytes + 16);
    for (const Tensor& other : tensors) {
        const char *first = std::max(tensor.begin, other.begin),
                   *last = std::min(tensor.begin + bytes, other.begin + other.bytes);
        if (first >= last) continue;
        overlapping = true;
        const Tensor& output = written ? other : tensor;
        if (bool(tensor.shadow) != bool(other.shadow)) {
            output.shadow->set_written(output.offset(first), size_t(last - first));
        }
    }
    recent = nullptr;
    tensors.insert(tensors.begin() + ptrdiff_t(written ? tensors.size() : outputs),
                   std::move(tensor));
    outputs += !written;
}

void forget() {
    tensors.clear();
    outputs = 0;
    overlapping = false;
    recent = nullptr;
}

void launch_begin() {
    constexpr unsigned kMostSerials = 1u << (64 - kTimeBits - kMemberBits);
    launch_serial = next_serial;
    const uint64_t after = launch_serial + uint64_t(launched->grid.x) * launched->grid.y *
                                               launched->grid.z / launched->cluster;
    if (after >= kMostSerials) fail("this process has emulated more CTAs than can be told apart");
    next_serial = unsigned(after);
}

void cluster_begins(Cluster& cluster) {
    start_clocks(cluster, launch_serial + unsigned(cluster.number));
    while (arenas.size() < kMostCtas) arenas.emplace_back(kMostShared);
}

void thread_ends(const Thread& thread) {
    Cta& cta = *thread.cta;
    for (unsigned member = 0; member < cta.visits.size(); ++member) {
        Visit& visit = cta.visits[member];
        const Epoch epoch = epoch_of(*cta.cluster, member, visit.time);
        if (visit.time == 0 || comes_before(epoch, thread)) {
            visit.time = 0;
        } else if (cta.alive == 0) {
            fail("the CTA returns and does not know whether " + name_of(epoch) +
                     " has done with its shared memory, which it touched there",
                 lines({visit.pc}));
        }
    }
}

void reach(Cta& cta, const void* pc) {
    Thread& self = *running;
    if (&cta == self.cta) return;
    const Cluster& cluster = *cta.cluster;
    if (cta.alive == 0) {
        fail("reaches into shared memory of CTA " + text(cta.block) + ", which has returned");
    }
    if (!(self.knows_running >> cta.rank & 1)) {
        const auto of_cta = self.clock.seen.begin() + cta.first();
        if (cluster.clock.floor == cluster.clock.start &&
            std::none_of(of_cta, of_cta + cluster.stride,
                         [&](int time) { return time >= cluster.clock.start; })) {
            fail("reaches into shared memory of CTA " + text(cta.block) +
                 ", which may not have started: no cluster_sync before");
        }
        self.knows_running |= 1u << cta.rank;
    }
    if (cta.visits.empty()) cta.visits.resize(cluster.clock.engines);
    cta.visits[self.member()] = {time_of(self.clock.now), pc};
}

std::string name_of(Epoch epoch) {
    const unsigned stride = (launched->threads + kWarp - 1) / kWarp * kWarp;
    const unsigned serial = serial_of(epoch), member = member_of(epoch), rank = member / stride;
    if (rank >= launched->cluster) return "the asynchronous engine";
    const std::string name = "thread " + std::to_string(member % stride);
    if (running && serial == running->cta->cluster->clock.serial && rank == running->cta->rank) {
        return name;
    }
    const uint64_t number = uint64_t(serial - launch_serial) * launched->cluster + rank;
    return name + " of CTA " + text(block_of(number));
}

void read(const void* address, size_t bytes, const void* pc) {
    check(Access::read, address, bytes, natural(bytes), pc);
}

void write(const void* address, size_t bytes, const void* pc) {
    check(Access::write, address, bytes, natural(bytes), pc);
}

void atomic(const void* address, size_t bytes, const void* pc) {
    check(Access::atomic, address, bytes, natural(bytes), pc);
}

void read_range(const void* address, size_t bytes, size_t alignment, const void* pc) {
    check(Access::read, address, bytes, alignment, pc);
}

void write_range(const void* address, size_t bytes, size_t alignment, const void* pc) {
    check(Access::write, address, bytes, alignment, pc);
}

void atomic_range(const void* address, size_t bytes, size_t alignment, const void* pc) {
    check(Access::atomic, address, bytes, alignment, pc);
}

void copy_begin(const void* shared, const void* pc) {
    const size_t offset = shared_offset(Access::write, shared, 16);
    check_alignment(Access::write, static_cast<const char*>(shared), 16, 16);
    hold(*running->cta, offset, 16, Held::by_cp_async, pc);
}

void copy_landed(const void* shared) {
    const Cta& cta = *running->cta;
    const size_t offset = size_t(static_cast<const unsigned char*>(shared) - cta.shared);
    arenas[cta.slot].land(offset, 16, running->clock.now);
}

void hold_mbarrier(Cta& cta, size_t offset, const void* pc) {
    hold(cta, offset, 8, Held::by_mbarrier, pc);
}

size_t shared_offset(Access access, const void* shared, size_t bytes) {
    const auto address = static_cast<const char*>(shared);
    const size_t offset = size_t(address - reinterpret_cast<const char*>(running->cta->shared));
    if (offset >= launched->shared_bytes || launched->shared_bytes - offset < bytes) {
        fail_outside(access, address, bytes);
    }
    return offset;
}

void bulk_begin(Cta& cta, size_t offset, size_t bytes, const void* pc) {
    reach(cta, pc);
    hold(cta, offset, bytes, Held::by_engine, pc);
}

void bulk_landed(const Cta& cta, size_t offset, size_t bytes, Epoch writer) {
    arenas[cta.slot].land(offset, bytes, writer);
}

void bulk_begin(const void* global, size_t bytes, const void* pc) {
    const auto address = static_cast<const char*>(global);
    const Tensor* tensor = find(address, bytes);
    if (tensor == nullptr) fail_outside(Access::write, address, bytes);
    if (!tensor->shadow) fail_input(Access::write, *tensor, address, bytes);
    const Visitor visitor{running, false, launch_serial, pack_place(pc)};
    const Finding finding =
        tensor->shadow->hold(tensor->offset(address), bytes, Held::by_engine, visitor);
    if (finding.fault == Fault::none) return;
    fail_finding(Access::write, finding, tensor_byte(finding.offset, *tensor), bytes);
}

void bulk_landed(const void* global, size_t bytes) {
    const auto address = static_cast<const char*>(global);
    const Tensor& tensor = *find(address, bytes);
    tensor.shadow->land(tensor.offset(address), bytes, 0);
}

void async_read(const void* shared, size_t bytes, const void* pc, Epoch engine) {
    const Finding finding = read_by_engine(shared, bytes, pc, engine);
    if (finding.fault == Fault::none) return;
    fail_finding(Access::read, finding, byte_text(finding.offset, "shared memory"), bytes);
}

void async_read_tensor(const void* global, size_t bytes, const void* pc) {
    const auto address = static_cast<const char*>(global);
    const Tensor* tensor = find(address, bytes);
    if (tensor == nullptr) fail_outside(Access::read, address, bytes);
    if (!tensor->shadow) return;
    const Visitor visitor{running, false, launch_serial, pack_place(pc)};
    const Finding finding =
        tensor->shadow->read_by_engine(tensor->offset(address), bytes, visitor);
    if (finding.fault == Fault::none) return;
    const std::string where = tensor_byte(finding.offset, *tensor);
    if (finding.fault != Fault::unfenced) fail_finding(Access::read, finding, where, bytes);
    fail("reads " + counted(bytes, "byte") + " at " + where + " by the asynchronous proxy, which " +
         name_of(finding.other) + " " + finding.did + " at " +
         lines({unpack_place(finding.place)}) +
         " in this launch: fence_proxy_async covers no global memory");
}

void async_read_ends(const void* shared, size_t bytes, const char* what, const void* pc) {
    const Finding finding = read_by_engine(shared, bytes, pc, 0);
    if (finding.fault == Fault::none) return;
    fail("byte " + std::to_string(finding.offset) + " of shared memory, which a " + what + ", at " +
         lines({pc}) + ", may still read, " + name_of(finding.other) + " " + finding.did +
         " at " + lines({unpack_place(finding.place)}) + " before that was waited for");
}

}  // namespace gk::emulator::memory
