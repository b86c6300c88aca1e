// The kernels of one instruction set. Shapes, dtypes and devices have been checked by the Python side.
#pragma once

#include "cpu_features.hpp"
#include "tensor.hpp"

namespace utnetv2 {

struct Kernels {
    // mean and variance (B, C) of x (B, C, *spatial) over its spatial axes.
    void (*channel_moments)(const Tensor& x, const Tensor& mean, const Tensor& variance);

    // grad_x (B, C, *spatial) of them, plus `other`, laid out in any way, or null.
    void (*channel_moments_backward)(const Tensor& grad_mean, const Tensor& grad_variance, const Tensor& x,
                                     const Tensor& mean, const Tensor* other, const Tensor& grad_x);

    // out = bias + x convolved with weight; x and out (B, C, *spatial), weight (C, 1, *k), bias (C) or null.
    void (*depthwise_conv)(const Tensor& x, const Tensor& weight, const Tensor* bias, const Tensor& out);

    // grad_weight (C, 1, *k) from grad_out and x (B, C, *spatial).
    void (*depthwise_conv_backward_weight)(const Tensor& grad_out, const Tensor& x, const Tensor& grad_weight);

    // out = x * scale + shift, then ReLU if `relu`; x and out (B, C, *spatial), scale and shift (B, C).
    void (*scale_shift)(const Tensor& x, const Tensor& scale, const Tensor& shift, bool relu, const Tensor& out);

    // grad_x (B, C, *spatial), grad_scale and grad_shift (B, C).
    void (*scale_shift_backward)(const Tensor& grad_out, const Tensor& x, const Tensor& scale, const Tensor& shift,
                                 bool relu, const Tensor& grad_x, const Tensor& grad_scale, const Tensor& grad_shift);
};

// The kernels compiled for `set`, which the processor must have.
const Kernels& kernels(InstructionSet set);

}  // namespace utnetv2
