// Threads come from the OpenMP runtime that torch has loaded, so that torch.set_num_threads governs them.
#pragma once

#include <cstdint>

namespace utnetv2 {

// How many threads a parallel region starts; 1 without OpenMP.
int thread_count();

// Calls run(context, i) once for every i in [0, count), spread over the threads; an exception of any call is rethrown.
void run_parallel(int64_t count, void (*run)(const void* context, int64_t i), const void* context);

// At least `bytes` bytes that belong to the calling thread until it asks again, aligned to a cache line.
void* scratch(int64_t bytes);

namespace {

// Work is cut into pieces by the shapes alone, never by the number of threads, and each piece writes what no other
// does: results do not depend on the threads.
template <class F>
inline void parallel_for(int64_t count, const F& run) {
    run_parallel(
        count, [](const void* context, int64_t i) { (*static_cast<const F*>(context))(i); }, &run);
}

}  // namespace
}  // namespace utnetv2
