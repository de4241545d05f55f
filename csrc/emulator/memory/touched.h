// When a thread last touched its registers, which are the variables on its stack: what wgmma asks
// of accumulators and A's fragments. A thread's words are followed from its first wgmma.fence on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace gk::emulator {

class Touched {
  public:
    // Whether anything is followed.
    bool on() const { return words_ != nullptr; }
    void start(size_t stack_bytes);
    // Of a thread that starts anew: nothing is followed, nothing in flight.
    void stop();

    // Of an access to `bytes` at `offset` on the stack: kept, and false where a wgmma in flight has
    // them.
    bool access(size_t offset, size_t bytes) {
        uint32_t* word = words_ + offset / 4;
        uint32_t* const last = words_ + (offset + bytes - 1) / 4;
        do {
            if (*word == kInFlight) return false;
            *word = now_;
        } while (word++ != last);
        return true;
    }

    void fence() { ++now_; }
    // Whether any of them was accessed since the last fence, or is in flight.
    bool since_fence(size_t offset, size_t bytes) const { return any(offset, bytes, now_); }
    bool in_flight(size_t offset, size_t bytes) const { return any(offset, bytes, kInFlight); }
    void set_in_flight(size_t offset, size_t bytes);
    void set_landed(size_t offset, size_t bytes);

  private:
    // Else: how many fences the thread had passed at the last access.
    static constexpr uint32_t kInFlight = 0xffffffff;
    bool any(size_t offset, size_t bytes, uint32_t what) const {
        bool found = false;
        for (size_t i = 0; i < bytes / 4; ++i) found |= words_[offset / 4 + i] == what;
        return found;
    }

    struct Free {
        void operator()(uint32_t* words) const { std::free(words); }
    };
    std::unique_ptr<uint32_t, Free> kept_;  // from one CTA to the next: what it says is old
    uint32_t* words_ = nullptr;
    uint32_t now_ = 1;
    size_t size_ = 0, flying_ = 0;  // words: all, and those in flight
};

}  // namespace gk::emulator
