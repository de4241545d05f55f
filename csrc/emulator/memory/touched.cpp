#include "emulator/memory/touched.h"

#include <algorithm>
#include <new>

namespace gk::emulator {

void Touched::start(size_t stack_bytes) {
    if (kept_ == nullptr) {
        size_ = stack_bytes / 4;
        // The words are zeroed, which costs nothing until they are touched.
        kept_.reset(static_cast<uint32_t*>(std::calloc(size_, sizeof(uint32_t))));
        if (kept_ == nullptr) throw std::bad_alloc();
    }
    words_ = kept_.get();
}

void Touched::stop() {
    if (flying_ > 0) std::fill(words_, words_ + size_, 0);
    flying_ = 0;
    words_ = nullptr;
}

void Touched::set_in_flight(size_t offset, size_t bytes) {
    flying_ += bytes / 4;
    std::fill_n(words_ + offset / 4, bytes / 4, kInFlight);
}

void Touched::set_landed(size_t offset, size_t bytes) {
    flying_ -= bytes / 4;
    std::fill_n(words_ + offset / 4, bytes / 4, 0);
}

}  // namespace gk::emulator
