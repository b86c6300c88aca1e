"""y = x * scale + shift, then ReLU, for every channel of every sample; scale and shift are (B, C).

Backward, with g the gradient of y where the ReLU let it through (y > 0, computed again) and 0 elsewhere:
    grad_x = g * scale    grad_scale = sum of g * x over the positions    grad_shift = sum of g
One pass writes grad_x and, for each part of the positions, the two sums; the sums of few parts are added afterwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from utnetv2_fast.kernels.channel_maps import STAGES, Maps, offsets, place
from utnetv2_fast.kernels.launch import on_device_of_tensors


@on_device_of_tensors
def scale_shift(x: Tensor, scale: Tensor, shift: Tensor, relu: bool) -> Tensor:
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    maps = Maps.of(x, out)
    blocks = maps.blocks("scale_shift", x.dtype, x.device)
    _scale_shift_kernel[(maps.tiles(blocks),)](
        x, scale, shift, out, *maps.arguments(), *scale.stride(), *shift.stride(), RELU=relu, **blocks
    )
    return out


@on_device_of_tensors
def scale_shift_backward(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_scale, grad_shift = torch.empty_like(x), torch.empty_like(scale), torch.empty_like(shift)
    if x.numel() == 0:
        return grad_x, grad_scale, grad_shift
    maps = Maps.of(x, grad_out, grad_x)
    blocks = maps.blocks("scale_shift_backward", x.dtype, x.device)
    splits, steps = maps.split(blocks, x.device)
    sums = (grad_scale[None], grad_shift[None]) if splits == 1 else scale.new_empty(2, splits, *scale.shape).unbind()
    _scale_shift_backward_kernel[(maps.groups(blocks) * splits,)](
        x,
        grad_out,
        grad_x,
        scale,
        shift,
        *sums,
        *maps.arguments(),
        *scale.stride(),
        *shift.stride(),
        *sums[0].stride(),
        *sums[1].stride(),
        splits,
        steps,
        RELU=relu,
        **{"STAGES": STAGES, **blocks},
    )
    if splits > 1:
        torch.sum(sums[0], 0, out=grad_scale)
        torch.sum(sums[1], 0, out=grad_shift)
    return grad_x, grad_scale, grad_shift


@triton.jit
def _scale_shift_kernel(
    p_x,  # (B, C, D, H, W)
    p_scale,  # (B, C)
    p_shift,  # (B, C)
    p_out,  # (B, C, D, H, W)
    channels,
    positions,
    height,
    width,
    s_x_b,
    s_x_c,
    s_x_d,
    s_x_h,
    s_x_w,
    s_out_b,
    s_out_c,
    s_out_d,
    s_out_h,
    s_out_w,
    s_scale_b,
    s_scale_c,
    s_shift_b,
    s_shift_c,
    RELU: tl.constexpr,
    AXES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i_b, o_c, i_p = place(channels, tl.cdiv(positions, BLOCK_P), BLOCK_C)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    m_c = o_c < channels
    m = m_c[:, None] & (o_p < positions)[None, :]
    b_scale = tl.load(p_scale + i_b * s_scale_b + o_c * s_scale_c, mask=m_c, other=0)
    b_shift = tl.load(p_shift + i_b * s_shift_b + o_c * s_shift_c, mask=m_c, other=0)
    o_x = offsets(i_b, o_c, o_p, height, width, s_x_b, s_x_c, s_x_d, s_x_h, s_x_w, AXES)
    b_x = tl.load(p_x + o_x, mask=m, other=0).to(tl.float32)
    b_y = b_x * b_scale[:, None] + b_shift[:, None]
    if RELU:
        b_y = tl.where(b_y <= 0, 0.0, b_y)  # not maximum, which loses NaN
    o_out = offsets(i_b, o_c, o_p, height, width, s_out_b, s_out_c, s_out_d, s_out_h, s_out_w, AXES)
    tl.store(p_out + o_out, b_y.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["splits", "steps"])
def _scale_shift_backward_kernel(
    p_x,  # (B, C, D, H, W)
    p_grad_out,  # (B, C, D, H, W)
    p_grad_x,  # (B, C, D, H, W)
    p_scale,  # (B, C)
    p_shift,  # (B, C)
    p_grad_scale,  # (splits, B, C)
    p_grad_shift,  # (splits, B, C)
    channels,
    positions,
    height,
    width,
    s_x_b,
    s_x_c,
    s_x_d,
    s_x_h,
    s_x_w,
    s_grad_out_b,
    s_grad_out_c,
    s_grad_out_d,
    s_grad_out_h,
    s_grad_out_w,
    s_grad_x_b,
    s_grad_x_c,
    s_grad_x_d,
    s_grad_x_h,
    s_grad_x_w,
    s_scale_b,
    s_scale_c,
    s_shift_b,
    s_shift_c,
    s_grad_scale_split,
    s_grad_scale_b,
    s_grad_scale_c,
    s_grad_shift_split,
    s_grad_shift_b,
    s_grad_shift_c,
    splits,
    steps,
    RELU: tl.constexpr,
    AXES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_b, o_c, i_split = place(channels, splits, BLOCK_C)
    m_c = o_c < channels
    b_scale = tl.load(p_scale + i_b * s_scale_b + o_c * s_scale_c, mask=m_c, other=0)
    b_shift = tl.load(p_shift + i_b * s_shift_b + o_c * s_shift_c, mask=m_c, other=0)
    b_grad_scale = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    b_grad_shift = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        o_p = (i_split * steps + step) * BLOCK_P + tl.arange(0, BLOCK_P)
        m = m_c[:, None] & (o_p < positions)[None, :]
        o_x = offsets(i_b, o_c, o_p, height, width, s_x_b, s_x_c, s_x_d, s_x_h, s_x_w, AXES)
        o_grad_out = offsets(
            i_b, o_c, o_p, height, width, s_grad_out_b, s_grad_out_c, s_grad_out_d, s_grad_out_h, s_grad_out_w, AXES
        )
        b_x = tl.load(p_x + o_x, mask=m, other=0).to(tl.float32)
        b_grad = tl.load(p_grad_out + o_grad_out, mask=m, other=0).to(tl.float32)
        if RELU:
            b_y = b_x * b_scale[:, None] + b_shift[:, None]
            b_grad = tl.where(b_y <= 0, 0.0, b_grad)
        b_grad_scale += b_grad * b_x
        b_grad_shift += b_grad
        o_grad_x = offsets(
            i_b, o_c, o_p, height, width, s_grad_x_b, s_grad_x_c, s_grad_x_d, s_grad_x_h, s_grad_x_w, AXES
        )
        tl.store(p_grad_x + o_grad_x, (b_grad * b_scale[:, None]).to(p_grad_x.dtype.element_ty), mask=m)
    o_grad_scale = i_split * s_grad_scale_split + i_b * s_grad_scale_b + o_c * s_grad_scale_c
    o_grad_shift = i_split * s_grad_shift_split + i_b * s_grad_shift_b + o_c * s_grad_shift_c
    tl.store(p_grad_scale + o_grad_scale, tl.sum(b_grad_scale, 1), mask=m_c)
    tl.store(p_grad_shift + o_grad_shift, tl.sum(b_grad_shift, 1), mask=m_c)
