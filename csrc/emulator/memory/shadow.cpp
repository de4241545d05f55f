#include "emulator/memory/shadow.h"

#include <algorithm>
#include <new>

#include "emulator/fiber/grid.h"

namespace gk::emulator {

struct Cell {
    Epoch writer;         // 0: never written
    Epoch readers[2];     // since then; a reader that comes before another is dropped
    unsigned written_at;  // a place (emulator/memory/report.h) and flags
    unsigned read_at[2];  // the places of these reads
    unsigned more;        // the list of further readers, all of one cluster; 0: none
};

static_assert(sizeof(Readers) == 128);

namespace {

constexpr size_t kLine = 16, kPart = 2, kParts = kLine / kPart;

// Flags of the last write, above the 28 bits of its place.
constexpr unsigned kAtomic = 1u << 28;
constexpr unsigned kInFlight = 1u << 29;
constexpr unsigned kSeveral = 1u << 30;          // atomics by threads that are not ordered
constexpr unsigned kSeveralClusters = 1u << 31;  // ... of several clusters
constexpr unsigned kBulk = 1u << 30;  // without kAtomic: a bulk copy, perhaps in flight
constexpr unsigned kMbarrier = kInFlight | kAtomic;

constexpr unsigned kPlace = kAtomic - 1;

// A flag above the place of a read in a line's cell: the cells of the line's parts are valid
// instead.
constexpr unsigned kSplit = 1u << 31;

constexpr Epoch kHost = 1;  // before all CTAs, which count from 1

template <bool kShared>
class Check {
  public:
    Check(const Visitor& visitor, ReaderLists& more)
        : more_(more),
          thread_(*visitor.thread),
          now_(thread_.clock.now),
          reader_(visitor.reader ? visitor.reader : now_),
          first_(thread_.cta->first()),
          stride_(thread_.cta->cluster->stride),
          engines_(thread_.cta->cluster->clock.engines),
          floor_(thread_.cta->clock.floor),
          cluster_floor_(thread_.cta->cluster->clock.floor),
          seen_(thread_.clock.seen.data()),
          launch_(visitor.launch_serial),
          place_(visitor.place) {}

    bool read(Cell& cell, Finding& finding) const {
        if (cell.readers[0] == reader_) return true;
        if (unwritten(cell)) return found(finding, Fault::unwritten, cell);
        if (!after_writer(cell, finding)) return false;
        keep_reader(cell);
        return true;
    }

    bool write(Cell& cell, Finding& finding, unsigned flags = 0) const {
        if (!unwritten(cell)) {
            if (!after_writer(cell, finding) || !after_readers(cell, finding)) return false;
        }
        start(cell, flags);
        return true;
    }

    bool atomic(Cell& cell, Finding& finding) const {
        if (unwritten(cell)) return found(finding, Fault::unwritten, cell);
        unsigned flags = kAtomic;
        if ((cell.written_at & (kAtomic | kInFlight)) == kAtomic) {
            if (!in_order(cell)) {
                flags |= kSeveral | (cell.written_at & kSeveralClusters);
                if (serial_of(cell.writer) != serial_of(now_)) flags |= kSeveralClusters;
            }
        } else if (!after_writer(cell, finding)) {
            return false;
        }
        if (!after_readers(cell, finding)) return false;
        start(cell, flags);
        return true;
    }

    // A read by the asynchronous engine.
    bool engine_read(Cell& cell, Finding& finding) const {
        if (!read(cell, finding)) return false;
        if ((cell.written_at & kBulk) && !(cell.written_at & kAtomic)) return true;
        if (!kShared) {
            return serial_of(cell.writer) < launch_ || found(finding, Fault::unfenced, cell);
        }
        const Thread& writer = writer_of(cell);
        const auto& fences = writer.fences;
        const auto next = std::lower_bound(fences.begin(), fences.end(), time_of(cell.writer));
        if (next == fences.end() || !before(at_time(cell.writer, *next))) {
            return found(finding, Fault::unfenced, cell);
        }
        return true;
    }

  private:
    void start(Cell& cell, unsigned flags) const {
        if (cell.more) more_.give_back(cell.more);
        cell = {now_, {0, 0}, place_ | flags, {0, 0}, 0};
    }

    const Thread& writer_of(const Cell& cell) const {
        const unsigned member = member_of(cell.writer);
        return *thread_.cta->cluster->ctas[member / stride_]->fibers[member % stride_];
    }

    bool unwritten(const Cell& cell) const {
        return kShared ? serial_of(cell.writer) != serial_of(now_) : cell.writer == 0;
    }

    bool before(Epoch epoch) const {
        if (((epoch ^ now_) >> kTimeBits) == 0) return true;
        if (serial_of(epoch) != serial_of(now_)) return kShared || serial_of(epoch) < launch_;
        const unsigned member = member_of(epoch);
        return time_of(epoch) < floor_of(member) || time_of(epoch) <= seen_[member];
    }

    // No floor covers the engine's writers: only a thread that has waited for them comes after
    // them.
    int floor_of(unsigned member) const {
        if (member - first_ < stride_) return floor_;
        return member < engines_ ? cluster_floor_ : 0;
    }

    // Of several unordered atomics the cell knows only the last. It stands for all atomics of its
    // cluster only at barriers of the whole cluster.
    bool in_order(const Cell& cell) const {
        constexpr unsigned kAtomics = kAtomic | kSeveral;
        if ((cell.written_at & kAtomics) != kAtomics) return before(cell.writer);
        if (serial_of(cell.writer) < launch_) return true;
        return !(cell.written_at & kSeveralClusters) && serial_of(cell.writer) == serial_of(now_) &&
               time_of(cell.writer) < cluster_floor_;
    }

    bool after_writer(const Cell& cell, Finding& finding) const {
        if (cell.written_at & kInFlight) {
            const bool mbarrier = (cell.written_at & kMbarrier) == kMbarrier;
            return found(finding, mbarrier ? Fault::mbarrier : Fault::in_flight, cell);
        }
        return in_order(cell) || found(finding, Fault::race, cell);
    }

    bool after_readers(const Cell& cell, Finding& finding) const {
        for (int i = 0; i < 2; ++i) {
            const Epoch reader = cell.readers[i];
            if (reader != 0 && !before(reader)) {
                finding = {Fault::race, 0, reader, cell.read_at[i] & kPlace, "read"};
                return false;
            }
        }
        if (cell.more == 0) return true;
        const Readers& readers = more_[cell.more];
        for (unsigned warp = 0; warp < Readers::kWarps; ++warp) {
            // The cluster's floor is never above that of a CTA.
            if (readers.latest < cluster_floor_ && readers.serial == serial_of(now_)) break;
            const unsigned lanes = unordered(readers, warp);
            if (lanes == 0) continue;
            finding = {Fault::race, 0, reader_of(readers, warp, lanes),
                       readers.warps[warp].place & kPlace, "read"};
            return false;
        }
        for (const Reader& reader : readers.others) {
            if (reader.epoch != 0 && !before(reader.epoch)) {
                finding = {Fault::race, 0, reader.epoch, reader.place, "read"};
                return false;
            }
        }
        return true;
    }

    static Epoch reader_of(const Readers& readers, unsigned warp, unsigned lanes) {
        const unsigned member = warp * kWarp + unsigned(__builtin_ctz(lanes));
        return epoch_at(readers.serial, member, readers.warps[warp].time);
    }

    // The lanes of a warp whose reads do not come before this thread.
    unsigned unordered(const Readers& readers, unsigned warp) const {
        const WarpReaders& there = readers.warps[warp];
        if (there.lanes == 0) return 0;
        if (readers.serial != serial_of(now_)) {
            return kShared || readers.serial < launch_ ? 0 : there.lanes;
        }
        if (there.time < floor_of(warp * kWarp)) return 0;
        unsigned found = 0;
        for (unsigned left = there.lanes; left != 0; left &= left - 1) {
            const unsigned lane = unsigned(__builtin_ctz(left)), member = warp * kWarp + lane;
            if (there.time > seen_[member] && member != member_of(now_)) found |= 1u << lane;
        }
        return found;
    }

    // A reader that comes before this one need not be kept: a thread that waits for this reader
    // waits for both. Two readers of different clusters are enough: any writer collides with one of
    // them.
    void keep_reader(Cell& cell) const {
        const Epoch(&readers)[2] = cell.readers;
        int i = 0;
        if (readers[0] != 0 && !covered(readers[0])) {
            if (readers[1] != 0 && !covered(readers[1])) {
                if (serial_of(readers[0]) != serial_of(readers[1])) return;
                if (serial_of(readers[0]) == serial_of(now_)) return keep_further(cell);
            }
            i = 1;
        }
        cell.readers[i] = reader_;
        cell.read_at[i] = place_;
    }

    // A thread that waits for the engine knows nothing of what came before the thread that started
    // the engine.
    bool covered(Epoch reader) const {
        if (reader_ == now_) return before(reader);
        return ((reader ^ reader_) >> kTimeBits) == 0 ||
               time_of(reader) < floor_of(member_of(reader));
    }

    void keep_further(Cell& cell) const {
        if (cell.more == 0) cell.more = more_.take();
        Readers& readers = more_[cell.more];
        if (readers.serial != serial_of(now_)) readers.start(serial_of(now_));
        const unsigned member = member_of(reader_);
        if (member < engines_ && member / kWarp < Readers::kWarps) {
            WarpReaders& mine = readers.warps[member / kWarp];
            const int time = time_of(reader_);
            if (mine.time != time && unordered(readers, member / kWarp) == 0) mine = {time, 0, 0};
            if (mine.time == time) {
                mine.lanes |= 1u << member % kWarp;
                mine.place = place_;
                readers.latest = std::max(readers.latest, time);
                return;
            }
        }
        auto& others = readers.others;
        const unsigned count = member < engines_ ? engines_ : engines_ + kEngines;
        if (others.size() < count) others.resize(count);
        others[member] = {reader_, place_};
    }

    static bool found(Finding& finding, Fault fault, const Cell& cell) {
        const bool bulk = (cell.written_at & kBulk) && !(cell.written_at & kAtomic);
        finding = {fault, 0, cell.writer, cell.written_at & kPlace,
                   cell.written_at & kAtomic ? "updated" : bulk ? "copied to" : "wrote", bulk};
        return false;
    }

    ReaderLists& more_;
    const Thread& thread_;
    const Epoch now_, reader_;
    const unsigned first_, stride_, engines_;
    const int floor_, cluster_floor_;
    const int* seen_;
    const unsigned launch_, place_;
};

}  // namespace

unsigned ReaderLists::take() {
    if (free_.empty()) {
        lists_.emplace_back();
        return unsigned(lists_.size());
    }
    const unsigned list = free_.back();
    free_.pop_back();
    return list;
}

void ReaderLists::give_back(unsigned list) {
    lists_[list - 1].serial = 0;
    free_.push_back(list);
}

Shadow::Cells Shadow::make(size_t count) {
    // The cells are zeroed, which costs nothing until they are touched.
    const auto cells = static_cast<Cell*>(std::calloc(count, sizeof(Cell)));
    if (cells == nullptr) throw std::bad_alloc();
    return Cells(cells);
}

Shadow::Shadow(size_t bytes)
    : lines_(make(bytes / kLine + 1)), parts_(make((bytes / kLine + 1) * kParts)) {}

// Gives each part of a line a list of readers of its own.
void Shadow::share_readers(Cell& line, Cell* parts) {
    for (size_t i = 1; i < kParts; ++i) {
        const unsigned list = more_.take();
        more_[list] = more_[line.more];
        parts[i].more = list;
    }
    line.more = 0;
}

// Calls f(cell, offset) for the cells of the bytes, as long as f returns true. `merges`: f leaves
// all parts of a line alike.
template <class F>
void Shadow::visit(size_t offset, size_t bytes, bool merges, F&& f) {
    const size_t end = offset + bytes;
    for (size_t line = offset / kLine; line * kLine < end; ++line) {
        const size_t first = std::max(offset, line * kLine);
        const size_t last = std::min(end, (line + 1) * kLine);
        const bool whole = last - first == kLine;
        Cell &cell = lines_[line], *parts = &parts_[line * kParts];
        if (!(cell.read_at[0] & kSplit)) {
            if (whole) {
                if (!f(cell, first)) return;
                continue;
            }
            std::fill(parts, parts + kParts, cell);
            if (cell.more) share_readers(cell, parts);
            cell.read_at[0] |= kSplit;
        }
        for (size_t at = first / kPart; at * kPart < last; ++at) {
            if (!f(parts[at % kParts], std::max(first, at * kPart))) return;
        }
        if (whole && merges) cell = parts[0];
    }
}

template <bool kShared>
Finding Shadow::touch_as(Access access, size_t offset, size_t bytes, const Visitor& visitor) {
    const Check<kShared> check(visitor, more_);
    Finding finding;
    const auto located = [&](bool fine, size_t at) {
        if (!fine) finding.offset = at;
        return fine;
    };
    switch (access) {
        case Access::read:
            visit(offset, bytes, false, [&](Cell& cell, size_t at) {
                return located(check.read(cell, finding), at);
            });
            break;
        case Access::write:
            visit(offset, bytes, true, [&](Cell& cell, size_t at) {
                return located(check.write(cell, finding), at);
            });
            break;
        case Access::atomic:
            visit(offset, bytes, false, [&](Cell& cell, size_t at) {
                return located(check.atomic(cell, finding), at);
            });
            break;
    }
    return finding;
}

Finding Shadow::touch(Access access, size_t offset, size_t bytes, const Visitor& visitor) {
    return visitor.shared ? touch_as<true>(access, offset, bytes, visitor)
                          : touch_as<false>(access, offset, bytes, visitor);
}

template <bool kShared>
Finding Shadow::hold_as(size_t offset, size_t bytes, Held by, const Visitor& visitor) {
    const unsigned flags = by == Held::by_engine     ? kInFlight | kBulk
                           : by == Held::by_mbarrier ? kMbarrier
                                                     : kInFlight;
    const Check<kShared> check(visitor, more_);
    Finding finding;
    visit(offset, bytes, true, [&](Cell& cell, size_t at) {
        const bool fine = check.write(cell, finding, flags);
        if (!fine) finding.offset = at;
        return fine;
    });
    return finding;
}

Finding Shadow::hold(size_t offset, size_t bytes, Held by, const Visitor& visitor) {
    return visitor.shared ? hold_as<true>(offset, bytes, by, visitor)
                          : hold_as<false>(offset, bytes, by, visitor);
}

void Shadow::land(size_t offset, size_t bytes, Epoch writer) {
    visit(offset, bytes, true, [&](Cell& cell, size_t) {
        if (writer != 0) cell.writer = writer;
        cell.written_at &= ~kInFlight;
        return true;
    });
}

Finding Shadow::read_by_engine(size_t offset, size_t bytes, const Visitor& visitor) {
    return visitor.shared ? read_by_engine_as<true>(offset, bytes, visitor)
                          : read_by_engine_as<false>(offset, bytes, visitor);
}

template <bool kShared>
Finding Shadow::read_by_engine_as(size_t offset, size_t bytes, const Visitor& visitor) {
    const Check<kShared> check(visitor, more_);
    Finding finding;
    visit(offset, bytes, false, [&](Cell& cell, size_t at) {
        const bool fine = check.engine_read(cell, finding);
        if (!fine) finding.offset = at;
        return fine;
    });
    return finding;
}

void Shadow::set_written(size_t offset, size_t bytes) {
    visit(offset, bytes, true, [](Cell& cell, size_t) {
        cell.writer = kHost;
        return true;
    });
}

}  // namespace gk::emulator
