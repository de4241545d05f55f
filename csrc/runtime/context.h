// A launcher runs on a thread that has a context of its device. Autograd's threads and new Python
// threads have none at first, and the driver makes tensor maps only where there is one.
#pragma once

namespace gk {

// For as long as the object lives, the calling thread has a context of the device: the one that it
// has already, or else the device's primary context, which the CUDA runtime and PyTorch use.
// Afterwards the thread has what it had before. No other device gets a context. Does nothing in a
// dry run for another machine. Throws Error.
class Context {
  public:
    explicit Context(int device);
    ~Context();
    Context(const Context&) = delete;
    Context& operator=(const Context&) = delete;

  private:
    int device_ = 0;
    bool bound_ = false;  // by this object
};

}  // namespace gk
