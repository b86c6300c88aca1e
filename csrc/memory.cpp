#include "memory.hpp"

#include <climits>
#include <cstdlib>  // defines __GLIBC__ where that is the C library

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace utnetv2 {

bool keep_freed_memory() {
#ifdef __GLIBC__
    // Above the first threshold malloc maps a block and unmaps it when freed; above the second it shrinks the heap.
    // INT_MAX is the largest value that mallopt takes, and more than any one tensor of this package.
    constexpr int growth = 64 << 20;
    const bool mapped = mallopt(M_MMAP_THRESHOLD, INT_MAX) == 1;
    const bool trimmed = mallopt(M_TRIM_THRESHOLD, -1) == 1;
    const bool padded = mallopt(M_TOP_PAD, growth) == 1;
    return mapped && trimmed && padded;
#else
    return false;
#endif
}

}  // namespace utnetv2
