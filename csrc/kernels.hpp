// The kernels of one instruction set. Shapes, dtypes and devices have been checked by the Python side.
#pragma once

#include "cpu_features.hpp"
#include "tensor.hpp"

namespace utnetv2 {

struct Kernels {
    // out = bias + x convolved with weight; x and out (B, C, *spatial), weight (C, 1, *k), bias (C) or null.
    void (*depthwise_conv)(const Tensor& x, const Tensor& weight, const Tensor* bias, const Tensor& out);

    // grad_weight (C, 1, *k) from grad_out and x (B, C, *spatial).
    void (*depthwise_conv_backward_weight)(const Tensor& grad_out, const Tensor& x, const Tensor& grad_weight);

    // grad_weight (C_out, C_in, *k) of a dense convolution from grad_out (B, C_out, *spatial) and x (B, C_in, *spatial).
    void (*conv_backward_weight)(const Tensor& grad_out, const Tensor& x, const Tensor& grad_weight);
};

// The kernels compiled for `set`, which the processor must have.
const Kernels& kernels(InstructionSet set);

}  // namespace utnetv2
