// When a thread last touched its registers, which are the variables on its stack. wgmma needs to
// know it of accumulators and of A's fragments. A thread's words are followed from its first
// wgmma.fence on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace gk::emulator {

class Touched {
  public:
    // Whether the thread's words are followed.
    bool on() const { return words_ != nullptr; }
    void start(size_t stack_bytes);
    // For a thread that starts anew: nothing is followed, and nothing is in flight.
    void stop();

    // Records an access to `bytes` at `offset` on the stack. Returns false if a wgmma in flight has
    // any of these words.
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
    // Whether any of the words was accessed since the last fence, or is in flight.
    bool since_fence(size_t offset, size_t bytes) const { return any(offset, bytes, now_); }
    bool in_flight(size_t offset, size_t bytes) const { return any(offset, bytes, kInFlight); }
    void set_in_flight(size_t offset, size_t bytes);
    void set_landed(size_t offset, size_t bytes);

  private:
    // A word is this, or the number of fences that the thread had passed at the last access.
    static constexpr uint32_t kInFlight = 0xffffffff;
    bool any(size_t offset, size_t bytes, uint32_t what) const {
        bool found = false;
        for (size_t i = 0; i < bytes / 4; ++i) found |= words_[offset / 4 + i] == what;
        return found;
    }

    struct Free {
        void operator()(uint32_t* words) const { std::free(words); }
    };
    std::unique_ptr<uint32_t, Free> kept_;  // kept for the next CTA; its words are then out of date
    uint32_t* words_ = nullptr;
    uint32_t now_ = 1;
    size_t size_ = 0, flying_ = 0;  // numbers of words: all, and those in flight
};

}  // namespace gk::emulator
