// A stack and the place at which to go on: one for each emulated thread.
#pragma once

#include <cstddef>

namespace gk::emulator {

class Fiber {
  public:
    // A stack ends in a guard page. The tops of the stacks are staggered by `index`: at equal
    // addresses modulo a page, the same variable of all threads would compete for one set of the
    // cache.
    explicit Fiber(unsigned index);
    ~Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // The next `enter` calls `entry`, from the top of the stack. `entry` must not return.
    void start(void (*entry)());
    // Runs the fiber until it calls `leave`. Called from the host's own stack.
    void enter();
    // Goes back to `enter`'s caller, which goes on as if `enter` had returned.
    void leave();

    // For a fiber that has left: the frame in which it called `leave`.
    const char* frame() const;
    const char* stack_begin() const { return stack_; }
    const char* stack_end() const { return stack_ + kStackBytes; }

  private:
    static constexpr size_t kStackBytes = 64 * 1024;
    char* stack_;
    char* top_;
    void* stack_pointer_ = nullptr;
    void* host_stack_pointer_ = nullptr;
};

}  // namespace gk::emulator
