// A tensor as it crosses from Python: where it lies, never what owns it.
#pragma once

#include <cstdint>

namespace utnetv2 {

enum class DType { float32, float64, bfloat16, float16 };

constexpr int MAX_DIMENSIONS = 5;

struct Tensor {
    void* data;
    DType dtype;
    int dimensions;
    int64_t sizes[MAX_DIMENSIONS];
    int64_t strides[MAX_DIMENSIONS];  // in elements
};

}  // namespace utnetv2
