#include "parallel.hpp"

#include <cstdlib>
#include <exception>
#include <memory>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace utnetv2 {

int thread_count() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

void run_parallel(int64_t count, void (*run)(const void* context, int64_t i), const void* context) {
    std::exception_ptr failure;
    const auto guarded = [&](int64_t i) {
        try {
            run(context, i);
        } catch (...) {
#ifdef _OPENMP
#pragma omp critical
#endif
            failure = std::current_exception();
        }
    };
#ifdef _OPENMP
    // Dynamic: another program on one of the cores must not make all the others wait. Several at a time: neighbours
    // often lie side by side in memory, and a small one takes less than it takes to fetch its number.
    const int64_t chunk = count / (16 * thread_count()) + 1;
#pragma omp parallel for schedule(dynamic, chunk) if (count > 1)
#endif
    for (int64_t i = 0; i < count; ++i) guarded(i);
    if (failure) std::rethrow_exception(failure);
}

void* scratch(int64_t bytes) {
    constexpr int64_t line = 64;
    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };
    // Kept from call to call: a large block that malloc returned to the system would cost a fault per page every time.
    thread_local std::unique_ptr<void, Free> memory;
    thread_local int64_t size = 0;
    if (size < bytes) {
        const int64_t rounded = (bytes + line - 1) / line * line;
        memory.reset();
        size = 0;
        memory.reset(std::aligned_alloc(line, static_cast<size_t>(rounded)));
        if (!memory) throw std::bad_alloc();
        size = rounded;
    }
    return memory.get();
}

}  // namespace utnetv2
