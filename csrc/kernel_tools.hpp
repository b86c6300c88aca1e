// What kernel files share besides vectors: small arithmetic, memory, and the choice of the storage type.
// Internal linkage for the reason given in vector.hpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "parallel.hpp"
#include "tensor.hpp"
#include "vector.hpp"

namespace utnetv2 {
namespace {

// An integer as a type.
template <int VALUE>
struct Constant {
    static constexpr int value = VALUE;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t clamp(int64_t value, int64_t low, int64_t high) { return larger(low, smaller(value, high)); }

template <class A>
inline void fill_zero(A* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = 0;
}

// Calls run(T{}) with the storage type T of `dtype`.
template <class F>
inline void for_storage(DType dtype, const F& run) {
    switch (dtype) {
        case DType::float32: return run(float{});
        case DType::float64: return run(double{});
        case DType::bfloat16: return run(BFloat16{});
        case DType::float16: return run(Float16{});
    }
}

// `count` elements that all threads may use, uninitialised, from a cache line's beginning on.
template <class T>
struct Buffer {
    explicit Buffer(int64_t count) : data(static_cast<T*>(::operator new(size_t(count) * sizeof(T), ALIGNMENT))) {}
    ~Buffer() { ::operator delete(data, ALIGNMENT); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    T* const data;

  private:
    static constexpr std::align_val_t ALIGNMENT{64};
};

// Arrays cut one after the other, each on a cache line of its own, from the calling thread's scratch memory.
class Arena {
  public:
    // The sizes, in bytes, of all that will be taken.
    template <class... Sizes>
    explicit Arena(Sizes... sizes) : next_(static_cast<char*>(scratch((padded(sizes) + ...)))) {}

    template <class T>
    T* take(int64_t count) {
        T* memory = reinterpret_cast<T*>(next_);
        next_ += padded(count * int64_t(sizeof(T)));
        return memory;
    }

  private:
    // An odd number of lines, so that arrays of the same power of two do not fall on the same sets of the cache.
    static int64_t padded(int64_t bytes) { return (divide_up(bytes, 64) | 1) * 64; }
    char* next_;
};

}  // namespace
}  // namespace utnetv2
