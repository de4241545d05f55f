// The shadow of memory: who wrote and read a place last, and whether the thread that comes now is
// ordered after them. A cell stands for a line of 16 bytes until an access touches only a part of
// the line. Then eight cells stand for 2 bytes each, until the line is again written as a whole.
// Kernels move nothing smaller: two threads at neighbouring single bytes would count as at one
// place.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <vector>

#include "emulator/fiber/clock.h"

namespace gk::emulator {

struct Cell;

// A reader, and where in the code it read.
struct Reader {
    Epoch epoch = 0;
    unsigned place = 0;
};

// Lanes of one warp that read at the same time of their clocks, as lanes do that meet at each
// barrier.
struct WarpReaders {
    int time;
    unsigned lanes;
    unsigned place;  // of one of these lanes
};

// Further readers of one cell, all of one cluster. There are many of these lists, so each takes two
// lines of a cache.
struct alignas(64) Readers {
    static constexpr unsigned kWarps = 8;
    unsigned serial = 0;          // the cluster's
    int latest = 0;               // the latest of the times of `warps`
    WarpReaders warps[kWarps]{};  // the first warps of the cluster
    std::vector<Reader> others;   // all other readers, by member
    void start(unsigned cluster) {
        serial = cluster;
        latest = 0;
        for (WarpReaders& warp : warps) warp = {0, 0, 0};
        others.clear();
    }
};

// The lists of the readers for which their cells have no room, numbered from 1.
class ReaderLists {
  public:
    unsigned take();
    void give_back(unsigned list);
    Readers& operator[](unsigned list) { return lists_[list - 1]; }

  private:
    std::vector<Readers> lists_;
    std::vector<unsigned> free_;
};

enum class Access { read, write, atomic };
enum class Fault { none, unwritten, in_flight, mbarrier, unfenced, race };
// Why nobody may touch some bytes: a copy will write them, or they are an mbarrier.
enum class Held { by_cp_async, by_engine, by_mbarrier };

// What is wrong with an access, and with what it collides: `other` accessed the bytes at `place`.
struct Finding {
    Fault fault = Fault::none;
    size_t offset = 0;
    Epoch other = 0;
    unsigned place = 0;
    const char* did = nullptr;  // "read", "wrote", "updated" by an atomic, "copied to"
    bool bulk = false;          // `other` started a bulk copy
};

// Who accesses memory, and which kind of memory. Shared memory knows only its own cluster: what an
// earlier cluster left there counts as never written. In global memory the other clusters of the
// launch, numbered from `launch_serial`, are never ordered, and all clusters before them come
// before everything.
struct Visitor {
    const Thread* thread;
    bool shared;
    unsigned launch_serial;
    unsigned place;
    Epoch reader = 0;  // the engine that reads; 0: the thread itself
};

// The shadow of memory that begins at a multiple of 16.
class Shadow {
  public:
    explicit Shadow(size_t bytes);

    // Checks an access and records it, up to the first place where something is wrong.
    Finding touch(Access access, size_t offset, size_t bytes, const Visitor& visitor);
    // The visitor gives bytes away: nobody may touch them until they land. Then they count as
    // written by `writer` or, if that is 0, by the visitor.
    Finding hold(size_t offset, size_t bytes, Held by, const Visitor& visitor);
    void land(size_t offset, size_t bytes, Epoch writer);
    // A read by the asynchronous engine, for the visitor. A thread that wrote the bytes by ordinary
    // stores must have executed its proxy fence after that, and the visitor must be ordered after
    // the fence. No such fence exists for global memory, so nobody may have written there in this
    // launch.
    Finding read_by_engine(size_t offset, size_t bytes, const Visitor& visitor);
    // The host has written the bytes before all launches.
    void set_written(size_t offset, size_t bytes);

  private:
    struct Free {
        void operator()(Cell* cells) const { std::free(cells); }
    };
    using Cells = std::unique_ptr<Cell[], Free>;
    static Cells make(size_t count);
    void share_readers(Cell& line, Cell* parts);
    template <class F>
    void visit(size_t offset, size_t bytes, bool merges, F&& f);
    template <bool kShared>
    Finding touch_as(Access access, size_t offset, size_t bytes, const Visitor& visitor);
    template <bool kShared>
    Finding hold_as(size_t offset, size_t bytes, Held by, const Visitor& visitor);
    template <bool kShared>
    Finding read_by_engine_as(size_t offset, size_t bytes, const Visitor& visitor);

    Cells lines_, parts_;
    ReaderLists more_;
};

}  // namespace gk::emulator
