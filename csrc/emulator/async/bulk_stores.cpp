// Stores and reductions by the asynchronous engine, and the groups in which threads wait for them.
//
// When a store is started, its source must be written, fenced and free of races. The source must
// stay as it is until the thread has waited for it to be read, however early the engine reads it.
// Global memory changes when the engine gets to the store, at the latest when the thread waits for
// that.
#include <cstring>
#include <string>

#include "emulator/async/asynchronous.h"
#include "emulator/async/bulk.h"
#include "emulator/async/bulk_checks.h"
#include "emulator/fiber/grid.h"
#include "emulator/memory/memory.h"
#include "emulator/async/tma.h"

namespace gk::emulator {

struct BulkStore {
    const char* what;
    Box box;
    bool add;
    DType dtype;
    const void* pc;
    std::vector<unsigned char> data;  // of the box's rows, as it was when the store was started
    bool read, written;               // whether the engine has done so
    bool awaited;                     // whether the thread has waited for its writes
};

namespace {

float float_of(const unsigned char* from, DType dtype) {
    if (dtype == DType::bf16) {
        __nv_bfloat16 x;
        std::memcpy(&x, from, sizeof x);
        return __bfloat162float(x);
    }
    if (dtype == DType::f16) {
        __half x;
        std::memcpy(&x, from, sizeof x);
        return __half2float(x);
    }
    float x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

void put(unsigned char* to, float value, DType dtype) {
    if (dtype == DType::bf16) {
        const __nv_bfloat16 x = __float2bfloat16_rn(value);
        std::memcpy(to, &x, sizeof x);
    } else if (dtype == DType::f16) {
        const __half x = __float2half_rn(value);
        std::memcpy(to, &x, sizeof x);
    } else {
        std::memcpy(to, &value, sizeof value);
    }
}

void add(unsigned char* to, const unsigned char* from, size_t bytes, DType dtype) {
    const auto step = size_t(gk::detail::bytes_of(dtype));
    for (size_t i = 0; i < bytes; i += step) {
        put(to + i, float_of(to + i, dtype) + float_of(from + i, dtype), dtype);
    }
}

std::string name_of(const BulkStore& store) {
    return std::string(store.what) + ", at " + lines({store.pc});
}

// Calls f(part, bytes) for each part of the source, which the running thread reads for the engine.
template <class F>
void each_source(const BulkStore& store, F&& f) {
    const unsigned char* shared = running->cta->shared;
    for (const Row& row : store.box.rows) {
        each_part(store.box, row,
                  [&](size_t offset, size_t bytes) { f(shared + offset, bytes); });
    }
}

// All that is kept of a finished store is that it has not been awaited.
void release(BulkStore& store) {
    store.data = {};
    store.box.rows = {};
}

void write(BulkStore& store) {
    if (store.written) return;
    store.written = true;
    const unsigned char* from = store.data.data();
    for (const Row& row : store.box.rows) {
        const size_t bytes = row.last - row.first;
        if (store.add) {
            add(reinterpret_cast<unsigned char*>(row.global), from, bytes, store.dtype);
        } else {
            std::memcpy(row.global, from, bytes);
            memory::bulk_landed(row.global, bytes);
        }
        from += bytes;
    }
    if (store.read) release(store);
}

void start(BulkStore&& given) {
    auto store = std::make_shared<BulkStore>(std::move(given));
    each_source(*store, [&](const void* shared, size_t bytes) {
        memory::async_read(shared, bytes, store->pc);
    });
    store->data = gather_box(store->box, running->cta->shared);
    for (const Row& row : store->box.rows) {
        const size_t bytes = row.last - row.first;
        if (store->add) {
            memory::atomic_range(row.global, bytes, size_t(gk::detail::bytes_of(store->dtype)),
                                 store->pc);
        } else {
            memory::bulk_begin(row.global, bytes, store->pc);
        }
    }
    running->stores.started.push_back(store);
    later([store] { write(*store); });
}

// The store's source may be written again.
void finish_reading(BulkStore& store) {
    if (store.read) return;
    if (gather_box(store.box, running->cta->shared) != store.data) {
        fail("the source of a " + name_of(store) + ", has changed before it was waited for");
    }
    each_source(store, [&](const void* shared, size_t bytes) {
        memory::async_read_ends(shared, bytes, store.what, store.pc);
    });
    store.read = true;
    if (store.written) release(store);
}

// Calls f(store) for all but the `pending` newest groups.
template <class F>
void each_awaited(int pending, F&& f) {
    const BulkStores& stores = running->stores;
    if (stores.ends.size() <= size_t(pending)) return;
    const size_t end = stores.ends[stores.ends.size() - size_t(pending) - 1];
    for (size_t i = 0; i < end; ++i) f(*stores.started[i]);
}

// Drops the groups that are over.
void drop_finished(BulkStores& stores) {
    size_t groups = 0, count = 0;
    for (; groups < stores.ends.size(); ++groups) {
        const size_t end = stores.ends[groups];
        size_t done = count;
        while (done < end && stores.started[done]->awaited) ++done;
        if (done < end) break;
        count = end;
    }
    stores.started.erase(stores.started.begin(), stores.started.begin() + ptrdiff_t(count));
    stores.ends.erase(stores.ends.begin(), stores.ends.begin() + ptrdiff_t(groups));
    for (size_t& end : stores.ends) end -= count;
}

}  // namespace

void tma_store(const TensorMap* map, const void* shared, const int* at, int rank) {
    const void* pc = __builtin_return_address(0);
    start({"tma_store", checked_box("tma_store", Access::read, map, shared, at, rank), false,
           DType::f32, pc, {}, false, false, false});
}

void tma_reduce_add(const TensorMap* map, const void* shared, const int* at, int rank) {
    const void* pc = __builtin_return_address(0);
    const DType dtype = checked_map("tma_reduce_add", map).dtype;
    start({"tma_reduce_add", checked_box("tma_reduce_add", Access::read, map, shared, at, rank),
           true, dtype, pc, {}, false, false, false});
}

void bulk_store(void* global, const void* shared, unsigned bytes) {
    const void* pc = __builtin_return_address(0);
    start({"bulk_store", checked_bytes("bulk_store", Access::read, global, shared, bytes), false,
           DType::f32, pc, {}, false, false, false});
}

void bulk_reduce_add(float* global, const float* shared, unsigned bytes) {
    const void* pc = __builtin_return_address(0);
    start({"bulk_reduce_add", checked_bytes("bulk_reduce_add", Access::read, global, shared, bytes),
           true, DType::f32, pc, {}, false, false, false});
}

void bulk_commit() {
    BulkStores& stores = running->stores;
    stores.ends.push_back(stores.started.size());
}

void bulk_wait_read(int pending) { each_awaited(pending, finish_reading); }

void bulk_wait(int pending) {
    each_awaited(pending, [](BulkStore& store) {
        finish_reading(store);
        write(store);
        store.awaited = true;
    });
    drop_finished(running->stores);
}

void fence_proxy_async() { fence_proxy(*running); }

void bulk_stores_published(const char* what) {
    for (const auto& store : running->stores.started) {
        if (store->awaited) continue;
        fail(std::string(what) + " while a " + name_of(*store) +
             ", may still write to global memory: this thread has not called bulk_wait");
    }
}

void bulk_stores_end(const Thread& thread) {
    const BulkStores& stores = thread.stores;
    for (size_t i = 0; i < stores.started.size(); ++i) {
        const BulkStore& store = *stores.started[i];
        if (store.read) continue;
        const bool closed = !stores.ends.empty() && i < stores.ends.back();
        fail("this thread returns without having waited for its " + std::string(store.what) +
                 (closed ? "" : ", which no bulk_commit has closed"),
             lines({store.pc}));
    }
}

}  // namespace gk::emulator
