// How many clusters of a launch a device runs at a time: for persistent grids, whose last clusters
// would otherwise wait for the first to return.
#pragma once

#include "runtime/launch.h"

namespace gk {

namespace detail {
int resident_clusters(const void* kernel, const Launch& launch, int ctas_of_sm);
}  // namespace detail

// Returns how many clusters run at one time. The grid of the launch does not matter. In a dry run
// for another machine there is no device to ask; the result is then the number of clusters that
// give each multiprocessor `ctas_of_sm` CTAs. Throws Error.
template <class Params>
int resident_clusters(void (*kernel)(Params), const Launch& launch, int ctas_of_sm) {
    return detail::resident_clusters(reinterpret_cast<const void*>(kernel), launch, ctas_of_sm);
}

}  // namespace gk
