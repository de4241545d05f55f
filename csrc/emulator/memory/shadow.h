// The shadow of memory: who wrote and read there last, and whether the one who comes now had to
// wait for them. A cell stands for a line of 16 bytes until an access touches a part of it, then
// eight stand for 2 bytes each, until the line is again written as a whole. Kernels move nothing
// smaller: two threads at neighbouring single bytes would count as at one place.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <vector>

#include "emulator/fiber/clock.h"

namespace gk::emulator {

struct Cell;

// One that reads, and where.
struct Reader {
    Epoch epoch = 0;
    unsigned place = 0;
};

// Lanes of one warp that read at the same time of theirs, as those who meet at each barrier do.
struct WarpReaders {
    int time;
    unsigned lanes;
    unsigned place;  // of one of them
};

// Further readers of one cell, all of one cluster. Two lines of a cache: there are many of them.
struct alignas(64) Readers {
    static constexpr unsigned kWarps = 7;
    unsigned serial = 0;          // the cluster's
    int latest = 0;               // of the times of `warps`
    WarpReaders warps[kWarps]{};  // the cluster's first
    std::vector<Reader> others;   // by member
    void start(unsigned cluster) {
        serial = cluster;
        latest = 0;
        for (WarpReaders& warp : warps) warp = {0, 0, 0};
        others.clear();
    }
};

// The lists of readers of cells that have more than a cell has room for, numbered from 1.
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
// Why nobody may touch some bytes: a copy will write them, or they are no memory any more.
enum class Held { by_cp_async, by_engine, by_mbarrier };

// What is wrong with an access, and with whom it collides: `other` was at `place`.
struct Finding {
    Fault fault = Fault::none;
    size_t offset = 0;
    Epoch other = 0;
    unsigned place = 0;
    const char* did = nullptr;  // "read", "wrote", "updated" by an atomic, "copied to"
    bool bulk = false;          // by a bulk copy
};

// Who comes, and to which kind of memory. Shared memory knows only its own cluster: what an earlier
// one left there is as good as never written. In global memory other clusters of the launch,
// numbered from `launch_serial`, are never ordered and all before them come before everything.
struct Visitor {
    const Thread* thread;
    bool shared;
    unsigned launch_serial;
    unsigned place;
    Epoch reader = 0;  // whose reads they are; 0: the thread's
};

// Of memory from a multiple of 16 on.
class Shadow {
  public:
    explicit Shadow(size_t bytes);

    // Checks an access and keeps it, up to the first place where something is wrong.
    Finding touch(Access access, size_t offset, size_t bytes, const Visitor& visitor);
    // The visitor gives bytes away: until they land nobody may touch them. Then they are `writer`'s,
    // or if that is 0 stay the visitor's.
    Finding hold(size_t offset, size_t bytes, Held by, const Visitor& visitor);
    void land(size_t offset, size_t bytes, Epoch writer);
    // A read by the asynchronous engine, for the visitor: what threads wrote by ordinary stores
    // must have been followed by their proxy fence, and that by the visitor. There is none for global
    // memory, so nobody may have written there in this launch.
    Finding read_by_engine(size_t offset, size_t bytes, const Visitor& visitor);
    // By the host, before all launches.
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
