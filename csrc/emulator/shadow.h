// The shadow of memory, a cell for 2 bytes of it: who wrote and read there last, and whether the one
// who comes now had to wait for them.
#pragma once

#include "clock.h"

namespace gk::emulator {

struct Cell {
    Epoch writer;         // 0: never written
    Epoch readers[2];     // since then, as far as one does not come before another
    unsigned written_at;  // a place (report.h) and flags
    unsigned read_at;
};

enum class Access { read, write, atomic };
enum class Fault { none, unwritten, in_flight, race };

// What is wrong with an access, and with whom it collides: `other` was at `place`.
struct Finding {
    Fault fault = Fault::none;
    const Cell* cell = nullptr;
    Epoch other = 0;
    unsigned place = 0;
    const char* did = nullptr;  // "read", "wrote", "updated" by an atomic
};

// Who comes, and to which kind of memory. Cells of shared memory know only their own CTA: what an
// earlier one left there is as good as never written. In global memory other CTAs of the launch,
// numbered from `launch_serial`, are never ordered and all before them come before everything.
struct Visitor {
    const Thread* thread;
    bool shared;
    unsigned launch_serial;
    unsigned place;
};

// Checks an access to cells and keeps it, up to the first that finds something wrong.
Finding touch(Access access, Cell* begin, Cell* end, const Visitor& visitor);
// An asynchronous copy writes: until it lands nobody may touch these cells.
Finding start_copy(Cell* begin, Cell* end, const Visitor& visitor);
void land(Cell* begin, Cell* end, const Visitor& visitor);

// Before the first launch: the cells hold what the host wrote.
void set_written(Cell* begin, Cell* end);

}  // namespace gk::emulator
