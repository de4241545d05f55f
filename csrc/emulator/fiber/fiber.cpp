// Switching stacks saves the registers that a called function must keep, and the stack pointer. It
// saves no signal mask, which would cost a system call each time.
#include "emulator/fiber/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

extern "C" void gk_emulator_switch(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
    .text
    .globl gk_emulator_switch
    .hidden gk_emulator_switch
    .type gk_emulator_switch, @function
gk_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size gk_emulator_switch, . - gk_emulator_switch
)");
#elif defined(__aarch64__)
asm(R"(
    .text
    .globl gk_emulator_switch
    .hidden gk_emulator_switch
    .type gk_emulator_switch, %function
gk_emulator_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size gk_emulator_switch, . - gk_emulator_switch
)");
#else
#error "the emulator runs on x86-64 and aarch64"
#endif

namespace gk::emulator {
namespace {

// The guard is several times as large as a frame, so that no frame reaches past it. It is a whole
// number of pages, which have up to 64 KB.
constexpr size_t kGuardBytes = 64 * 1024;
constexpr size_t kStagger = 272, kStaggerRange = 4096;

}  // namespace

Fiber::Fiber(unsigned index) {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    if (mprotect(memory, kGuardBytes, PROT_NONE) != 0) throw std::bad_alloc();
    stack_ = static_cast<char*>(memory) + kGuardBytes;
    top_ = stack_ + kStackBytes - (index * kStagger) % kStaggerRange;
    top_ -= reinterpret_cast<uintptr_t>(top_) % 64;
}

Fiber::~Fiber() { munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes); }

void Fiber::start(void (*entry)()) {
    auto* slot = reinterpret_cast<void**>(top_);
#if defined(__x86_64__)
    // After `ret` the stack must lie 8 bytes past a multiple of 16, as after a call.
    *--slot = nullptr;
    *--slot = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--slot = nullptr;
#else
    slot -= 20;
    for (int i = 0; i < 20; ++i) slot[i] = nullptr;
    slot[11] = reinterpret_cast<void*>(entry);  // x30, where `ret` goes
#endif
    stack_pointer_ = slot;
}

const char* Fiber::frame() const {
#if defined(__x86_64__)
    constexpr int kFramePointer = 5;  // rbp, which is popped last
#else
    constexpr int kFramePointer = 10;  // x29
#endif
    return static_cast<const char*>(static_cast<void* const*>(stack_pointer_)[kFramePointer]);
}

void Fiber::enter() { gk_emulator_switch(&host_stack_pointer_, stack_pointer_); }

void Fiber::leave() { gk_emulator_switch(&stack_pointer_, host_stack_pointer_); }

}  // namespace gk::emulator
