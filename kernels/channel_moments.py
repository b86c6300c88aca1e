"""Mean and biased variance over the positions, for every channel of every sample.

Every lane of a tile follows the mean m and the sum of squared deviations q of the values that it meets (Welford):
    d = y - m    m += d / k    q += d (y - m)    for the k-th value,  y = x - the first value of the channel
and groups of n_i values with moments (m_i, q_i) are pooled (Chan et al.) as
    n = sum n_i    m = sum n_i m_i / n    q = sum q_i + sum n_i (m_i - m)^2
first the lanes of a program, then the parts of the positions. Without the shift a mean of 1e6 would leave m, in
float32, a resolution of 0.06.

Backward, over P positions:
    grad_x = 2 grad_variance / P * (x - mean) + grad_mean / P + the gradient that x has from elsewhere
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from utnetv2_fast.kernels.channel_maps import STAGES, Maps, load_of_channels, offsets, place
from utnetv2_fast.kernels.launch import cdiv, on_device_of_tensors, power_of_two

POOLED = 1024  # parts that one program pools: it reads them in one go


@triton.jit
def _pooled(b_count, b_mean, b_square):
    """(count, mean, squares) along the last axis; groups without values count nothing."""
    count = tl.sum(b_count, 1)
    b_pooled = tl.sum(b_count * b_mean, 1) / count
    b_apart = b_mean - b_pooled[:, None]
    return count, b_pooled, tl.sum(b_square + b_count * b_apart * b_apart, 1)


@triton.jit(do_not_specialize=["splits", "steps"])
def _forward_kernel(
    p_x, s_x,  # (B, C, D, H, W)
    p_mean,  # (splits, B, C), less the first value unless WHOLE
    p_variance,  # (splits, B, C)
    C, P, H, W, rows, splits, steps,  # rows is B * C
    WHOLE: tl.constexpr, AXES: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i_b, o_c, i_split = place(C, splits, BC)
    o_lane = tl.arange(0, BP)
    o_first = i_split * steps * BP
    m_c = o_c < C
    b_shift = load_of_channels(p_x, s_x, i_b, o_c, m_c).to(tl.float32)
    b_mean = tl.zeros([BC, BP], tl.float32)
    b_square = tl.zeros([BC, BP], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        o_p = o_first + step * BP + o_lane
        m = m_c[:, None] & (o_p < P)[None, :]
        b_x = tl.load(p_x + offsets(i_b, o_c, o_p, H, W, s_x, AXES), mask=m, other=0).to(tl.float32)
        b_y = tl.where(m, b_x - b_shift[:, None], b_mean)  # the mean itself changes neither moment
        b_apart = b_y - b_mean
        b_mean += b_apart * (1.0 / (step + 1))
        b_square += b_apart * (b_y - b_mean)
    # Only in its last step can a lane lie behind the last position.
    b_count = tl.minimum((P - o_first - o_lane + BP - 1) // BP, steps).to(tl.float32)
    count, b_mean, b_square = _pooled(b_count[None, :], b_mean, b_square)
    if WHOLE:
        b_mean += b_shift
    o_out = i_split * rows + i_b * C + o_c
    tl.store(p_mean + o_out, b_mean, mask=m_c)
    tl.store(p_variance + o_out, b_square / count, mask=m_c)


@triton.jit(do_not_specialize=["splits", "positions_of_split"])
def _pool_kernel(
    p_x, s_x,  # (B, C, D, H, W)
    p_means,  # (splits, B, C), less the first value
    p_variances,  # (splits, B, C)
    p_mean, p_variance,  # (B, C)
    C, P, rows, splits, positions_of_split,  # rows is B * C
    BR: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_split = tl.arange(0, BS).to(tl.int64)
    m_row = o_row < rows
    m = m_row[:, None] & (o_split < splits)[None, :]
    o_part = o_row[:, None] + o_split[None, :] * rows
    b_count = tl.minimum(P - o_split * positions_of_split, positions_of_split)
    b_count = tl.maximum(b_count, 0).to(tl.float32)[None, :]
    b_means = tl.load(p_means + o_part, mask=m, other=0)
    b_variances = tl.load(p_variances + o_part, mask=m, other=0)
    count, b_mean, b_square = _pooled(b_count, b_means, b_count * b_variances)
    b_shift = load_of_channels(p_x, s_x, o_row // C, o_row % C, m_row)
    tl.store(p_mean + o_row, b_mean + b_shift.to(tl.float32), mask=m_row)
    tl.store(p_variance + o_row, b_square / count, mask=m_row)


@triton.jit
def _backward_kernel(
    p_x, s_x, p_grad_x, s_grad_x,  # (B, C, D, H, W)
    p_other, s_other,  # (B, C, D, H, W); p_other may be None
    p_grad_mean, s_grad_mean, p_grad_variance, s_grad_variance, p_mean, s_mean,  # (B, C)
    C, P, H, W,
    AXES: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    i_b, o_c, i_p = place(C, tl.cdiv(P, BP), BC)
    o_p = i_p * BP + tl.arange(0, BP)
    m_c = o_c < C
    m = m_c[:, None] & (o_p < P)[None, :]
    b_grad_mean = load_of_channels(p_grad_mean, s_grad_mean, i_b, o_c, m_c)
    b_grad_variance = load_of_channels(p_grad_variance, s_grad_variance, i_b, o_c, m_c)
    b_mean = load_of_channels(p_mean, s_mean, i_b, o_c, m_c)
    b_x = tl.load(p_x + offsets(i_b, o_c, o_p, H, W, s_x, AXES), mask=m, other=0).to(tl.float32)
    b_slope, b_offset = 2.0 * b_grad_variance / P, b_grad_mean / P
    b_grad_x = b_slope[:, None] * (b_x - b_mean[:, None]) + b_offset[:, None]
    if p_other is not None:
        o_other = offsets(i_b, o_c, o_p, H, W, s_other, AXES)
        b_grad_x += tl.load(p_other + o_other, mask=m, other=0).to(tl.float32)
    tl.store(p_grad_x + offsets(i_b, o_c, o_p, H, W, s_grad_x, AXES), b_grad_x.to(p_grad_x.dtype.element_ty), mask=m)


@on_device_of_tensors
def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, variance = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return mean, variance
    maps = Maps.of(x)
    [s_x] = maps.strides
    blocks = maps.blocks("channel_moments", x.dtype, x.device)
    splits, steps = maps.split(blocks, x.device)
    rows = mean.numel()
    parts = (mean[None], variance[None]) if splits == 1 else mean.new_empty(2, splits, *mean.shape).unbind()
    _forward_kernel[(maps.groups(blocks) * splits,)](
        x, s_x, *parts, *maps.extent(), rows, splits, steps, WHOLE=splits == 1, **{"STAGES": STAGES, **blocks}
    )
    if splits > 1:
        BS = power_of_two(splits)
        BR = max(4, POOLED // BS)
        _pool_kernel[(cdiv(rows, BR),)](
            x, s_x, *parts, mean, variance, maps.channels, maps.positions, rows, splits, steps * blocks["BP"],
            BR=BR, BS=BS,
        )  # fmt: skip
    return mean, variance


@on_device_of_tensors
def channel_moments_backward(
    grad_mean: Tensor, grad_variance: Tensor, x: Tensor, mean: Tensor, other: Tensor | None
) -> Tensor:
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        return grad_x
    maps = Maps.of(x, grad_x, x if other is None else other)
    s_x, s_grad_x, s_other = maps.strides
    blocks = maps.blocks("channel_moments_backward", x.dtype, x.device)
    _backward_kernel[(maps.tiles(blocks),)](
        x, s_x, grad_x, s_grad_x, other, s_other,
        grad_mean, grad_mean.stride(), grad_variance, grad_variance.stride(), mean, mean.stride(),
        *maps.extent(), **blocks,
    )  # fmt: skip
    return grad_x
