// The kernels of one instruction set. Shapes, dtypes and devices have been checked by the Python side.
#pragma once

#include "cpu_features.hpp"
#include "tensor.hpp"

namespace utnetv2 {

struct Kernels {
    // out, map_out and column_lse (B, H, l), contiguous, of q, v (B, H, n, d) and map_q, map_v (B, H, l, d).
    void (*bidirectional_attention)(const Tensor& q, const Tensor& v, const Tensor& map_q, const Tensor& map_v,
                                    double scale, const Tensor& out, const Tensor& map_out, const Tensor& column_lse);
    void (*bidirectional_attention_backward)(const Tensor& grad_out, const Tensor& grad_map_out, const Tensor& q,
                                             const Tensor& v, const Tensor& map_q, const Tensor& map_v,
                                             const Tensor& map_out, const Tensor& column_lse, double scale,
                                             const Tensor& grad_q, const Tensor& grad_v, const Tensor& grad_map_q,
                                             const Tensor& grad_map_v);

    // The half of it that updates the tokens.
    void (*token_attention)(const Tensor& q, const Tensor& map_q, const Tensor& map_v, double scale,
                            const Tensor& out);
    void (*token_attention_backward)(const Tensor& grad_out, const Tensor& q, const Tensor& map_q, const Tensor& map_v,
                                     double scale, const Tensor& grad_q, const Tensor& grad_map_q,
                                     const Tensor& grad_map_v);

    // mean and variance (B, C) of x (B, C, *spatial) over its spatial axes.
    void (*channel_moments)(const Tensor& x, const Tensor& mean, const Tensor& variance);

    // grad_x (B, C, *spatial) of them, plus `other`, laid out in any way, or null.
    void (*channel_moments_backward)(const Tensor& grad_mean, const Tensor& grad_variance, const Tensor& x,
                                     const Tensor& mean, const Tensor* other, const Tensor& grad_x);

    // out = bias + in convolved with weight, in = x or, with scale and shift (B, C), [ReLU](x * scale + shift);
    // x and out (B, C, *spatial), weight (C, 1, *k), bias (C) or null.
    void (*depthwise_conv)(const Tensor& x, const Tensor& weight, const Tensor* bias, const Tensor* scale,
                           const Tensor* shift, bool relu, const Tensor& out);

    // grad_weight (C, 1, *k) from grad_out and in, as above.
    void (*depthwise_conv_backward_weight)(const Tensor& grad_out, const Tensor& x, const Tensor* scale,
                                           const Tensor* shift, bool relu, const Tensor& grad_weight);

    // grad_weight (C_out, C_in, *k) of a dense convolution from grad_out (B, C_out, *spatial), x (B, C_in, *spatial).
    void (*direct_conv_backward_weight)(const Tensor& grad_out, const Tensor& x, const Tensor& grad_weight);

    // out = x * scale + shift, then ReLU if `relu`; x and out (B, C, *spatial), scale and shift (B, C).
    void (*scale_shift)(const Tensor& x, const Tensor& scale, const Tensor& shift, bool relu, const Tensor& out);

    // grad_x (B, C, *spatial), grad_scale and grad_shift (B, C).
    void (*scale_shift_backward)(const Tensor& grad_out, const Tensor& x, const Tensor& scale, const Tensor& shift,
                                 bool relu, const Tensor& grad_x, const Tensor& grad_scale, const Tensor& grad_shift);

    // out (B, C_out, *spatial) = in convolved with weight (C_out, C_in, [any odd,] 3, 3), in = x (B, C_in, *spatial)
    // or, with scale and shift (B, C_in), [ReLU](x * scale + shift). The channels of all maps lie side by side.
    void (*winograd_conv)(const Tensor& x, const Tensor& weight, const Tensor* scale, const Tensor* shift, bool relu,
                          const Tensor& out);

    // grad_weight (C_out, C_in, [any odd,] 3, 3) from grad_out and in, as above.
    void (*winograd_conv_backward_weight)(const Tensor& grad_out, const Tensor& x, const Tensor* scale,
                                          const Tensor* shift, bool relu, const Tensor& grad_weight);
};

// DO(NAME) for every member, in their order.
#define UTNETV2_KERNELS(DO)              \
    DO(bidirectional_attention)          \
    DO(bidirectional_attention_backward) \
    DO(token_attention)                  \
    DO(token_attention_backward)         \
    DO(channel_moments)                  \
    DO(channel_moments_backward)         \
    DO(depthwise_conv)                   \
    DO(depthwise_conv_backward_weight)   \
    DO(direct_conv_backward_weight)      \
    DO(scale_shift)                      \
    DO(scale_shift_backward)             \
    DO(winograd_conv)                    \
    DO(winograd_conv_backward_weight)

// The kernels compiled for `set`, which the processor must have.
const Kernels& kernels(InstructionSet set);

}  // namespace utnetv2
