// Scratch memory of one thread, cut into arrays.
#pragma once

#include "cpu/vec.h"

namespace gk::cpu::GK_ISA {

class Room {
  public:
    // From null on, it only counts.
    explicit Room(void* start) : start_(static_cast<char*>(start)) {}

    template <class T>
    T* take(int64_t n) {
        T* found = start_ == nullptr ? nullptr : reinterpret_cast<T*>(start_ + used_);
        used_ += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return found;
    }
    int64_t used() const { return used_; }

  private:
    char* start_;
    int64_t used_ = 0;
};

}  // namespace gk::cpu::GK_ISA
