// Twins of the tensor memory accelerator (device/tma.h), for the emulator.
#pragma once

#include <cstdint>

namespace gk {
struct TensorMap;
}

namespace gk::emulator {

// `at`: `rank` coordinates, innermost first.
void tma_prefetch(const TensorMap* map);
void tma_load(void* shared, const TensorMap* map, uint64_t* bar, const int* at, int rank);
void tma_load_multicast(void* shared, const TensorMap* map, uint64_t* bar, const int* at, int rank,
                        unsigned mask);
void tma_store(const TensorMap* map, const void* shared, const int* at, int rank);
void tma_reduce_add(const TensorMap* map, const void* shared, const int* at, int rank);

void bulk_load(void* shared, const void* global, unsigned bytes, uint64_t* bar);
void bulk_store(void* global, const void* shared, unsigned bytes);
void bulk_reduce_add(float* global, const float* shared, unsigned bytes);

void bulk_commit();
void bulk_wait_read(int pending);
void bulk_wait(int pending);
void fence_proxy_async();

}  // namespace gk::emulator
