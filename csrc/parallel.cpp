#include "parallel.hpp"

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

}  // namespace utnetv2
