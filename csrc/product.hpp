// Products of small matrices that lie in cache: c[i][x] = sum over k of a[i][k] * b[k][x], x in whole vectors.
#pragma once

#include <cstdint>

#include "kernel_tools.hpp"
#include "vector.hpp"

namespace utnetv2 {
namespace {

// A matrix by its strides: element (i, k) at data[i * row + k * column].
template <class A>
struct Strided {
    const A* data;
    int64_t row, column;
};

// The registers hold a block of c of PRODUCT_ROWS rows and two vectors, two vectors of b and one element of a.
constexpr int PRODUCT_ROWS = UTNETV2_VECTOR_BYTES == 64 ? 12 : 6;

template <int ROWS, int VECTORS, bool ACCUMULATE, class A, class C>
inline void product_block(int64_t depth, const Strided<A>& a, const A* b, int64_t b_row, C* c, int64_t c_row) {
    constexpr int64_t L = LANES<A>;
    Vec<A> total[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int x = 0; x < VECTORS; ++x) total[i][x] = Vec<A>{};
    // An address has room for one or two strides: a pointer for every three rows spares registers.
    constexpr int GROUPS = (ROWS + 2) / 3;
    const A* rows[GROUPS];
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; ++g) rows[g] = a.data + 3 * g * a.row;
    const int64_t stride = a.row;
    for (int64_t k = 0; k < depth; ++k, b += b_row) {
        Vec<A> right[VECTORS];
#pragma GCC unroll 2
        for (int x = 0; x < VECTORS; ++x) right[x] = load(b + x * L);
#pragma GCC unroll 4
        for (int g = 0; g < GROUPS; ++g) keep_in_register(rows[g]);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
            const Vec<A> left = broadcast(rows[i / 3][i % 3 * stride]);
#pragma GCC unroll 2
            for (int x = 0; x < VECTORS; ++x) total[i][x] += left * right[x];
        }
#pragma GCC unroll 4
        for (int g = 0; g < GROUPS; ++g) rows[g] += a.column;
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int x = 0; x < VECTORS; ++x) {
            C* to = c + i * c_row + x * L;
            // Added at the end: a long sum in several calls is then a sum of their sums, and rounds less.
            store(to, ACCUMULATE ? load(to) + total[i][x] : total[i][x]);
        }
}

template <int VECTORS, bool ACCUMULATE, class A, class C, class F>
inline void product_rows(int64_t rows, int64_t depth, Strided<A> a, const A* b, int64_t b_row, C* c, int64_t c_row,
                         F&& meanwhile) {
    for (; rows >= PRODUCT_ROWS; rows -= PRODUCT_ROWS, a.data += PRODUCT_ROWS * a.row, c += PRODUCT_ROWS * c_row) {
        meanwhile();
        product_block<PRODUCT_ROWS, VECTORS, ACCUMULATE>(depth, a, b, b_row, c, c_row);
    }
    if (rows > 0) meanwhile();
    // What remains in two or three blocks.
    if (PRODUCT_ROWS > 6 && rows >= 6) {
        product_block<6, VECTORS, ACCUMULATE>(depth, a, b, b_row, c, c_row);
        rows -= 6, a.data += 6 * a.row, c += 6 * c_row;
    }
    switch (rows) {
        case 5: product_block<5, VECTORS, ACCUMULATE>(depth, a, b, b_row, c, c_row); break;
        case 4: product_block<4, VECTORS, ACCUMULATE>(depth, a, b, b_row, c, c_row); break;
        case 3: product_block<3, VECTORS, ACCUMULATE>(depth, a, b, b_row, c, c_row); break;
        case 2: product_block<2, VECTORS, ACCUMULATE>(depth, a, b, b_row, c, c_row); break;
        case 1: product_block<1, VECTORS, ACCUMULATE>(depth, a, b, b_row, c, c_row); break;
        default: break;
    }
}

// How often `product` calls `meanwhile`.
inline int64_t product_steps(int64_t rows, int64_t vectors) {
    return divide_up(vectors, 2) * divide_up(rows, PRODUCT_ROWS);
}

// c (rows x vectors of x) = a (rows x depth) b (depth x vectors of x), or added to what c holds. `meanwhile` is called
// before every few rows, for what memory can do while the processor multiplies.
template <bool ACCUMULATE, class A, class C, class F>
inline void product(int64_t rows, int64_t vectors, int64_t depth, const Strided<A>& a, const A* b, int64_t b_row, C* c,
                    int64_t c_row, F&& meanwhile) {
    constexpr int64_t L = LANES<A>;
    for (; vectors >= 2; vectors -= 2, b += 2 * L, c += 2 * L)
        product_rows<2, ACCUMULATE>(rows, depth, a, b, b_row, c, c_row, meanwhile);
    if (vectors) product_rows<1, ACCUMULATE>(rows, depth, a, b, b_row, c, c_row, meanwhile);
}

template <bool ACCUMULATE, class A>
inline void product(int64_t rows, int64_t vectors, int64_t depth, const Strided<A>& a, const A* b, int64_t b_row, A* c,
                    int64_t c_row) {
    product<ACCUMULATE>(rows, vectors, depth, a, b, b_row, c, c_row, [] {});
}

}  // namespace
}  // namespace utnetv2
