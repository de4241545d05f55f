#include "shadow.h"

#include "grid.h"
#include "report.h"

namespace gk::emulator {
namespace {

// Above a place's 28 bits, of the last write.
constexpr unsigned kAtomic = 1u << 28;
constexpr unsigned kInFlight = 1u << 29;
constexpr unsigned kSeveral = 1u << 30;      // atomics by threads with no order between
constexpr unsigned kSeveralCtas = 1u << 31;  // ... of several CTAs

constexpr Epoch kHost = 1;  // before all CTAs, which count from 1

template <bool kShared>
class Check {
  public:
    explicit Check(const Visitor& visitor)
        : thread_(*visitor.thread),
          now_(thread_.clock.now),
          floor_(thread_.cta->clock.floor),
          seen_(thread_.clock.seen.data()),
          launch_(visitor.launch_serial),
          place_(visitor.place) {}

    bool read(Cell& cell, Finding& finding) const {
        if (cell.readers[0] == now_) return true;
        if (unwritten(cell)) return found(finding, Fault::unwritten, cell);
        if (!after_writer(cell, finding)) return false;
        keep_reader(cell);
        return true;
    }

    bool write(Cell& cell, Finding& finding, unsigned flags = 0) const {
        if (!unwritten(cell)) {
            if (!after_writer(cell, finding) || !after_readers(cell, finding)) return false;
        }
        cell = {now_, {0, 0}, place_ | flags, 0};
        return true;
    }

    bool atomic(Cell& cell, Finding& finding) const {
        if (unwritten(cell)) return found(finding, Fault::unwritten, cell);
        unsigned flags = kAtomic;
        if (cell.written_at & kAtomic) {
            if (!in_order(cell)) {
                flags |= kSeveral | (cell.written_at & kSeveralCtas);
                if (serial_of(cell.writer) != serial_of(now_)) flags |= kSeveralCtas;
            }
        } else if (!after_writer(cell, finding)) {
            return false;
        }
        if (!after_readers(cell, finding)) return false;
        cell = {now_, {0, 0}, place_ | flags, 0};
        return true;
    }

    void land(Cell& cell) const {
        cell.writer = now_;
        cell.written_at &= ~kInFlight;
    }

  private:
    bool unwritten(const Cell& cell) const {
        return kShared ? serial_of(cell.writer) != serial_of(now_) : cell.writer == 0;
    }

    bool before(Epoch epoch) const {
        if (((epoch ^ now_) >> kTimeBits) == 0) return true;
        if (serial_of(epoch) != serial_of(now_)) return kShared || serial_of(epoch) < launch_;
        return time_of(epoch) < floor_ || time_of(epoch) <= seen_[thread_of(epoch)];
    }

    // Of several unordered atomics the cell knows the last alone, which stands for all of its CTA
    // at barriers of the whole CTA only.
    bool in_order(const Cell& cell) const {
        if (!(cell.written_at & kSeveral)) return before(cell.writer);
        if (serial_of(cell.writer) < launch_) return true;
        return !(cell.written_at & kSeveralCtas) && serial_of(cell.writer) == serial_of(now_) &&
               time_of(cell.writer) < floor_;
    }

    bool after_writer(const Cell& cell, Finding& finding) const {
        if (cell.written_at & kInFlight) return found(finding, Fault::in_flight, cell);
        return in_order(cell) || found(finding, Fault::race, cell);
    }

    bool after_readers(const Cell& cell, Finding& finding) const {
        for (const Epoch reader : cell.readers) {
            if (reader != 0 && !before(reader)) {
                finding = {Fault::race, &cell, reader, cell.read_at, "read"};
                return false;
            }
        }
        return true;
    }

    // A reader that comes before this one need not be kept: who waits for this one waits for both.
    // Where three are unordered, those of different CTAs or warps tell most.
    void keep_reader(Cell& cell) const {
        Epoch(&readers)[2] = cell.readers;
        if (readers[0] == 0 || before(readers[0])) {
            readers[0] = now_;
        } else if (readers[1] == 0 || before(readers[1]) || alike(readers[0], readers[1])) {
            readers[1] = now_;
        } else {
            return;
        }
        cell.read_at = place_;
    }

    // The two stand for one warp, or for one CTA, and this thread is of another.
    bool alike(Epoch a, Epoch b) const {
        if (serial_of(a) != serial_of(b)) return false;
        if (serial_of(a) != serial_of(now_)) return true;
        const unsigned warp = thread_of(a) / kWarp;
        return warp == thread_of(b) / kWarp && warp != thread_.warp();
    }

    static bool found(Finding& finding, Fault fault, const Cell& cell) {
        finding = {fault, &cell, cell.writer, cell.written_at & (kAtomic - 1),
                   cell.written_at & kAtomic ? "updated" : "wrote"};
        return false;
    }

    const Thread& thread_;
    const Epoch now_;
    const int floor_;
    const int* seen_;
    const unsigned launch_, place_;
};

template <bool kShared>
Finding touch_all(Access access, Cell* begin, Cell* end, const Visitor& visitor) {
    const Check<kShared> check(visitor);
    Finding finding;
    switch (access) {
        case Access::read:
            while (begin != end && check.read(*begin, finding)) ++begin;
            break;
        case Access::write:
            while (begin != end && check.write(*begin, finding)) ++begin;
            break;
        case Access::atomic:
            while (begin != end && check.atomic(*begin, finding)) ++begin;
            break;
    }
    return finding;
}

}  // namespace

Finding touch(Access access, Cell* begin, Cell* end, const Visitor& visitor) {
    return visitor.shared ? touch_all<true>(access, begin, end, visitor)
                          : touch_all<false>(access, begin, end, visitor);
}

Finding start_copy(Cell* begin, Cell* end, const Visitor& visitor) {
    const Check<true> check(visitor);
    Finding finding;
    while (begin != end && check.write(*begin, finding, kInFlight)) ++begin;
    return finding;
}

void land(Cell* begin, Cell* end, const Visitor& visitor) {
    const Check<true> check(visitor);
    for (; begin != end; ++begin) check.land(*begin);
}

void set_written(Cell* begin, Cell* end) {
    for (; begin != end; ++begin) begin->writer = kHost;
}

}  // namespace gk::emulator
