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

from utnetv2_fast.kernels.channel_maps import STAGES, Maps, offsets, place
from utnetv2_fast.kernels.launch import cdiv, on_device_of_tensors, power_of_two

POOLED = 1024  # parts that one program pools: it reads them in one go


@on_device_of_tensors
def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, variance = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return mean, variance
    maps = Maps.of(x)
    blocks = maps.blocks("channel_moments", x.dtype, x.device)
    splits, steps = maps.split(blocks, x.device)
    parts = (mean[None], variance[None]) if splits == 1 else mean.new_empty(2, splits, *mean.shape).unbind()
    _channel_moments_kernel[(maps.groups(blocks) * splits,)](
        x, *parts, *maps.arguments(), mean.numel(), splits, steps, WHOLE=splits == 1, **{"STAGES": STAGES, **blocks}
    )
    if splits > 1:
        rows, splits_held = mean.numel(), power_of_two(splits)
        rows_held = max(4, POOLED // splits_held)
        _pool_kernel[(cdiv(rows, rows_held),)](
            x,
            *parts,
            mean,
            variance,
            maps.channels,
            maps.positions,
            *x.stride()[:2],
            rows,
            splits,
            steps * blocks["BLOCK_P"],
            ROWS=rows_held,
            SPLITS=splits_held,
        )
    return mean, variance


@on_device_of_tensors
def channel_moments_backward(
    grad_mean: Tensor, grad_variance: Tensor, x: Tensor, mean: Tensor, other: Tensor | None
) -> Tensor:
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        return grad_x
    maps = Maps.of(x, grad_x, x if other is None else other)
    blocks = maps.blocks("channel_moments_backward", x.dtype, x.device)
    parameters = (grad_mean, grad_variance, mean)
    _channel_moments_backward_kernel[(maps.tiles(blocks),)](
        x, grad_x, other, *parameters, *maps.arguments(), *(s for p in parameters for s in p.stride()), **blocks
    )
    return grad_x


@triton.jit
def _pooled(b_count, b_mean, b_square):
    """(count, mean, squares) along the last axis; groups without values count nothing."""
    count = tl.sum(b_count, 1)
    b_pooled = tl.sum(b_count * b_mean, 1) / count
    b_apart = b_mean - b_pooled[:, None]
    return count, b_pooled, tl.sum(b_square + b_count * b_apart * b_apart, 1)


@triton.jit(do_not_specialize=["splits", "steps"])
def _channel_moments_kernel(
    p_x,  # (B, C, D, H, W)
    p_mean,  # (splits, B, C), less the first value unless WHOLE
    p_variance,  # (splits, B, C)
    channels,
    positions,
    height,
    width,
    s_x_b,
    s_x_c,
    s_x_d,
    s_x_h,
    s_x_w,
    rows,  # B * C
    splits,
    steps,
    WHOLE: tl.constexpr,
    AXES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_b, o_c, i_split = place(channels, splits, BLOCK_C)
    o_lane = tl.arange(0, BLOCK_P)
    o_first = i_split * steps * BLOCK_P
    m_c = o_c < channels
    b_shift = tl.load(p_x + i_b * s_x_b + o_c * s_x_c, mask=m_c, other=0).to(tl.float32)
    b_mean = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    b_square = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        o_p = o_first + step * BLOCK_P + o_lane
        m = m_c[:, None] & (o_p < positions)[None, :]
        o_x = offsets(i_b, o_c, o_p, height, width, s_x_b, s_x_c, s_x_d, s_x_h, s_x_w, AXES)
        b_x = tl.load(p_x + o_x, mask=m, other=0).to(tl.float32)
        b_y = tl.where(m, b_x - b_shift[:, None], b_mean)  # the mean itself changes neither moment
        b_apart = b_y - b_mean
        b_mean += b_apart * (1.0 / (step + 1))
        b_square += b_apart * (b_y - b_mean)
    # Only in its last step can a lane lie behind the last position.
    b_count = tl.minimum((positions - o_first - o_lane + BLOCK_P - 1) // BLOCK_P, steps).to(tl.float32)
    count, b_mean, b_square = _pooled(b_count[None, :], b_mean, b_square)
    if WHOLE:
        b_mean += b_shift
    o_out = i_split * rows + i_b * channels + o_c
    tl.store(p_mean + o_out, b_mean, mask=m_c)
    tl.store(p_variance + o_out, b_square / count, mask=m_c)


@triton.jit(do_not_specialize=["splits", "positions_of_split"])
def _pool_kernel(
    p_x,  # (B, C, D, H, W)
    p_means,  # (splits, B, C), less the first value
    p_variances,  # (splits, B, C)
    p_mean,  # (B, C)
    p_variance,  # (B, C)
    channels,
    positions,
    s_x_b,
    s_x_c,
    rows,  # B * C
    splits,
    positions_of_split,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_split = tl.arange(0, SPLITS).to(tl.int64)
    m_row = o_row < rows
    m = m_row[:, None] & (o_split < splits)[None, :]
    o_part = o_row[:, None] + o_split[None, :] * rows
    b_count = tl.minimum(positions - o_split * positions_of_split, positions_of_split)
    b_count = tl.maximum(b_count, 0).to(tl.float32)[None, :]
    b_means = tl.load(p_means + o_part, mask=m, other=0)
    b_variances = tl.load(p_variances + o_part, mask=m, other=0)
    count, b_mean, b_square = _pooled(b_count, b_means, b_count * b_variances)
    b_shift = tl.load(p_x + (o_row // channels) * s_x_b + (o_row % channels) * s_x_c, mask=m_row, other=0)
    tl.store(p_mean + o_row, b_mean + b_shift.to(tl.float32), mask=m_row)
    tl.store(p_variance + o_row, b_square / count, mask=m_row)


@triton.jit
def _channel_moments_backward_kernel(
    p_x,  # (B, C, D, H, W)
    p_grad_x,  # (B, C, D, H, W)
    p_other,  # (B, C, D, H, W) or None
    p_grad_mean,  # (B, C)
    p_grad_variance,  # (B, C)
    p_mean,  # (B, C)
    channels,
    positions,
    height,
    width,
    s_x_b,
    s_x_c,
    s_x_d,
    s_x_h,
    s_x_w,
    s_grad_x_b,
    s_grad_x_c,
    s_grad_x_d,
    s_grad_x_h,
    s_grad_x_w,
    s_other_b,
    s_other_c,
    s_other_d,
    s_other_h,
    s_other_w,
    s_grad_mean_b,
    s_grad_mean_c,
    s_grad_variance_b,
    s_grad_variance_c,
    s_mean_b,
    s_mean_c,
    AXES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i_b, o_c, i_p = place(channels, tl.cdiv(positions, BLOCK_P), BLOCK_C)
    o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    m_c = o_c < channels
    m = m_c[:, None] & (o_p < positions)[None, :]
    b_grad_mean = tl.load(p_grad_mean + i_b * s_grad_mean_b + o_c * s_grad_mean_c, mask=m_c, other=0)
    b_grad_variance = tl.load(p_grad_variance + i_b * s_grad_variance_b + o_c * s_grad_variance_c, mask=m_c, other=0)
    b_mean = tl.load(p_mean + i_b * s_mean_b + o_c * s_mean_c, mask=m_c, other=0)
    o_x = offsets(i_b, o_c, o_p, height, width, s_x_b, s_x_c, s_x_d, s_x_h, s_x_w, AXES)
    b_x = tl.load(p_x + o_x, mask=m, other=0).to(tl.float32)
    b_slope, b_offset = 2.0 * b_grad_variance / positions, b_grad_mean / positions
    b_grad_x = b_slope[:, None] * (b_x - b_mean[:, None]) + b_offset[:, None]
    if p_other is not None:
        o_other = offsets(i_b, o_c, o_p, height, width, s_other_b, s_other_c, s_other_d, s_other_h, s_other_w, AXES)
        b_grad_x += tl.load(p_other + o_other, mask=m, other=0).to(tl.float32)
    o_grad_x = offsets(i_b, o_c, o_p, height, width, s_grad_x_b, s_grad_x_c, s_grad_x_d, s_grad_x_h, s_grad_x_w, AXES)
    tl.store(p_grad_x + o_grad_x, b_grad_x.to(p_grad_x.dtype.element_ty), mask=m)
