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

from utnetv2_fast.kernels.channel_maps import STAGES, Maps, load_of_channels, offsets, place
from utnetv2_fast.kernels.launch import on_device_of_tensors


@triton.jit
def _forward_kernel(
    p_x, s_x,  # (B, C, D, H, W)
    p_scale, s_scale, p_shift, s_shift,  # (B, C)
    p_out, s_out,  # (B, C, D, H, W)
    C, P, H, W,
    RELU: tl.constexpr, AXES: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    i_b, o_c, i_p = place(C, tl.cdiv(P, BP), BC)
    o_p = i_p * BP + tl.arange(0, BP)
    m_c = o_c < C
    m = m_c[:, None] & (o_p < P)[None, :]
    b_scale = load_of_channels(p_scale, s_scale, i_b, o_c, m_c)
    b_shift = load_of_channels(p_shift, s_shift, i_b, o_c, m_c)
    b_x = tl.load(p_x + offsets(i_b, o_c, o_p, H, W, s_x, AXES), mask=m, other=0).to(tl.float32)
    b_y = b_x * b_scale[:, None] + b_shift[:, None]
    if RELU:
        b_y = tl.where(b_y <= 0, 0.0, b_y)  # not maximum, which loses NaN
    tl.store(p_out + offsets(i_b, o_c, o_p, H, W, s_out, AXES), b_y.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["splits", "steps"])
def _backward_kernel(
    p_x, s_x, p_grad_out, s_grad_out, p_grad_x, s_grad_x,  # (B, C, D, H, W)
    p_scale, s_scale, p_shift, s_shift,  # (B, C)
    p_grad_scale, s_grad_scale, p_grad_shift, s_grad_shift,  # (B, C, splits)
    C, P, H, W, splits, steps,
    RELU: tl.constexpr, AXES: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i_b, o_c, i_split = place(C, splits, BC)
    m_c = o_c < C
    b_scale = load_of_channels(p_scale, s_scale, i_b, o_c, m_c)
    b_shift = load_of_channels(p_shift, s_shift, i_b, o_c, m_c)
    b_grad_scale = tl.zeros([BC, BP], tl.float32)
    b_grad_shift = tl.zeros([BC, BP], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        o_p = (i_split * steps + step) * BP + tl.arange(0, BP)
        m = m_c[:, None] & (o_p < P)[None, :]
        b_x = tl.load(p_x + offsets(i_b, o_c, o_p, H, W, s_x, AXES), mask=m, other=0).to(tl.float32)
        o_grad_out = offsets(i_b, o_c, o_p, H, W, s_grad_out, AXES)
        b_grad = tl.load(p_grad_out + o_grad_out, mask=m, other=0).to(tl.float32)
        if RELU:
            b_y = b_x * b_scale[:, None] + b_shift[:, None]
            b_grad = tl.where(b_y <= 0, 0.0, b_grad)
        b_grad_scale += b_grad * b_x
        b_grad_shift += b_grad
        b_grad_x = (b_grad * b_scale[:, None]).to(p_grad_x.dtype.element_ty)
        tl.store(p_grad_x + offsets(i_b, o_c, o_p, H, W, s_grad_x, AXES), b_grad_x, mask=m)
    o_grad_scale = i_b * s_grad_scale[0] + o_c * s_grad_scale[1] + i_split * s_grad_scale[2]
    o_grad_shift = i_b * s_grad_shift[0] + o_c * s_grad_shift[1] + i_split * s_grad_shift[2]
    tl.store(p_grad_scale + o_grad_scale, tl.sum(b_grad_scale, 1), mask=m_c)
    tl.store(p_grad_shift + o_grad_shift, tl.sum(b_grad_shift, 1), mask=m_c)


@on_device_of_tensors
def scale_shift(x: Tensor, scale: Tensor, shift: Tensor, relu: bool) -> Tensor:
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    maps = Maps.of(x, out)
    s_x, s_out = maps.strides
    blocks = maps.blocks("scale_shift", x.dtype, x.device)
    _forward_kernel[(maps.tiles(blocks),)](
        x, s_x, scale, scale.stride(), shift, shift.stride(), out, s_out, *maps.extent(), RELU=relu, **blocks
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
    s_x, s_grad_out, s_grad_x = maps.strides
    blocks = maps.blocks("scale_shift_backward", x.dtype, x.device)
    splits, steps = maps.split(blocks, x.device)
    if splits == 1:
        sum_scale, sum_shift = grad_scale[..., None], grad_shift[..., None]
    else:
        sum_scale, sum_shift = scale.new_empty(2, splits, *scale.shape).movedim(1, -1).unbind()
    _backward_kernel[(maps.groups(blocks) * splits,)](
        x, s_x, grad_out, s_grad_out, grad_x, s_grad_x, scale, scale.stride(), shift, shift.stride(),
        sum_scale, sum_scale.stride(), sum_shift, sum_shift.stride(),
        *maps.extent(), splits, steps, RELU=relu, **{"STAGES": STAGES, **blocks},
    )  # fmt: skip
    if splits > 1:
        torch.sum(sum_scale, -1, out=grad_scale)
        torch.sum(sum_shift, -1, out=grad_shift)
    return grad_x, grad_scale, grad_shift
