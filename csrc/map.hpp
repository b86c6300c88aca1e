// A feature map (B, C, *spatial) by its strides.
#pragma once

#include <cstdint>

#include "tensor.hpp"

namespace utnetv2 {
namespace {

// (B, C, D, H, W) with strides; 2D has D = 1.
template <class T>
struct Map {
    T* data;
    int64_t b, c, d, h, w;  // strides

    T& operator()(int64_t ib, int64_t ic, int64_t id, int64_t ih, int64_t iw) const {
        return data[ib * b + ic * c + id * d + ih * h + iw * w];
    }
};

template <class T>
Map<T> as_map(const Tensor& t) {
    const int64_t* s = t.strides;
    T* data = static_cast<T*>(t.data);
    return t.dimensions == 4 ? Map<T>{data, s[0], s[1], 0, s[2], s[3]} : Map<T>{data, s[0], s[1], s[2], s[3], s[4]};
}

}  // namespace
}  // namespace utnetv2
