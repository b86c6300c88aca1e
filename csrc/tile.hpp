// Matrices copied between tensors of any strides and tiles: rows of whole vectors in cache, in the arithmetic's type.
#pragma once

#include <cstdint>

#include "kernel_tools.hpp"
#include "vector.hpp"

namespace utnetv2 {
namespace {

// A matrix in memory that is fetched into the caches bit by bit, beside other work, before it is copied or written: its
// rows or columns lie too scattered for the processor to foresee, and all at once they would keep it waiting.
template <class T>
class Fetch {
  public:
    // All of it in `steps` calls.
    Fetch(const T* from, int64_t row, int64_t column, int64_t rows, int64_t columns, int64_t steps)
        : at_(from), stride_(row == 1 ? column : row), runs_(row == 1 ? columns : rows),
          length_(row == 1 ? rows : columns) {
        lines_ = divide_up(runs_ * divide_up(length_, LINE), larger(steps, int64_t(1)));
    }

    void operator()() {
        for (int64_t i = 0; i < lines_ && runs_ > 0; ++i) {
            __builtin_prefetch(at_ + offset_, 0, 2);
            offset_ += LINE;
            if (offset_ >= length_) offset_ = 0, at_ += stride_, --runs_;
        }
    }

  private:
    static constexpr int64_t LINE = 64 / int64_t(sizeof(T));
    const T* at_;
    int64_t stride_;
    int64_t runs_;  // left
    int64_t length_, lines_;
    int64_t offset_ = 0;
};

// tile[r][c] = from[r * row + c * column] for r < rows and c < columns; zeros up to `pitch`, a multiple of LANES.
template <class T, class A>
inline void copy_in(const T* from, int64_t row, int64_t column, int64_t rows, int64_t columns, A* tile, int64_t pitch) {
    constexpr int64_t L = LANES<A>;
    if (column == 1) {
        for (int64_t r = 0; r < rows; ++r, from += row, tile += pitch) {
            int64_t c = 0;
            for (; c + L <= columns; c += L) store(tile + c, load(from + c));
            if (c < columns) store(tile + c, load_part(from + c, columns - c)), c += L;
            for (; c < pitch; c += L) store(tile + c, Vec<A>{});
        }
        return;
    }
    int64_t r0 = 0;
    if (row == 1) {
        for (; r0 + L <= rows; r0 += L) {
            A* to = tile + r0 * pitch;
            for (int64_t c0 = 0; c0 < pitch; c0 += L) {
                Vec<A> block[L];
#pragma GCC unroll 16
                for (int64_t c = 0; c < L; ++c)
                    block[c] = c0 + c < columns ? load(from + r0 + (c0 + c) * column) : Vec<A>{};
                transpose<A>(block);
#pragma GCC unroll 16
                for (int64_t r = 0; r < L; ++r) store(to + r * pitch + c0, block[r]);
            }
        }
    }
    for (int64_t r = r0; r < rows; ++r)
        for (int64_t c = 0; c < pitch; ++c)
            tile[r * pitch + c] = c < columns ? to_arithmetic(from[r * row + c * column]) : A(0);
}

// to[r * row + c * column] = tile[r][c] for r < rows and c < columns.
template <class T, class A>
inline void copy_out(const A* tile, int64_t pitch, int64_t rows, int64_t columns, T* to, int64_t row, int64_t column) {
    constexpr int64_t L = LANES<A>;
    if (column == 1) {
        for (int64_t r = 0; r < rows; ++r, tile += pitch, to += row) {
            int64_t c = 0;
            for (; c + L <= columns; c += L) store(to + c, load(tile + c));
            if (c < columns) store_part(to + c, load(tile + c), columns - c);
        }
        return;
    }
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) to[r * row + c * column] = from_arithmetic<T>(tile[r * pitch + c]);
}

}  // namespace
}  // namespace utnetv2
