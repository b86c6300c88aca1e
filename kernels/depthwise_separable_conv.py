"""Depthwise-separable convolution in one kernel: what lies between the two convolutions stays on chip.

    out[b, o, p] = sum over c of pointwise[o, c] * sum over taps t of depthwise[c, t] * y[b, c, p + t - k // 2]

with y = x, or [ReLU of] x * scale[b, c] + shift[b, c], zero outside of the map. A program owns BH * BW positions of a
plane and BO channels of out. It goes through the channels of x by BC: their depthwise result, rounded to the dtype of x
as if it had been written, is the left factor of a product of matrices whose sum stays in registers.

The kernels see a map as (B, C, D, H, W), see `depthwise_conv`; here D is only ever an index.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from utnetv2_fast.kernels.depthwise_conv import (
    add_taps,
    address,
    column,
    first_row,
    load_input,
    load_prologue,
    locate,
    masks_around,
    offset,
    plane_axes,
    plane_block,
    repeated,
    strides_of,
    view,
)
from utnetv2_fast.kernels.launch import cdiv, on_device_of_tensors, power_of_two, tuned
from utnetv2_fast.ops.precision import convolutions_in_tf32


@triton.jit
def stacked(tiles, ROWS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    if ROWS == 1:
        b = tiles[0]
    elif ROWS == 2:
        b = tl.join(tiles[0], tiles[1]).permute(2, 0, 1).reshape(2 * BP, BC)
    else:
        b = tl.join(tl.join(tiles[0], tiles[1]), tl.join(tiles[2], tiles[3])).permute(3, 2, 0, 1).reshape(4 * BP, BC)
    return b


@triton.jit(do_not_specialize=["D", "H"])
def _kernel(
    p_x, s_x,  # (B, C, D, H, W)
    p_scale, s_scale, p_shift, s_shift,  # (B, C) or None
    p_taps,  # (K_D, K_H, K_W, C) float32: the depthwise weight
    p_pointwise, s_pointwise,  # (C_OUT, C)
    p_out, s_out,  # (B, C_OUT, D, H, W)
    D, H, W,
    C: tl.constexpr, C_OUT: tl.constexpr, K_D: tl.constexpr, K_H: tl.constexpr, K_W: tl.constexpr,
    RELU: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    blocks_o: tl.constexpr = (C_OUT + BO - 1) // BO
    i_b, d, i_h, i_w = locate(tl.program_id(0) // blocks_o, H, W, D, ROWS, BH, BW)
    o_p = tl.arange(0, BH * BW)[:, None]
    o_h, o_w = first_row(o_p, i_h, ROWS, BH, BW), column(o_p, i_w, BW)
    o_o = (tl.program_id(0) % blocks_o * BO + tl.arange(0, BO))[None, :]
    m_rows, m_columns = masks_around(o_h, H, ROWS + K_H - 1, K_H), masks_around(o_w, W, K_W, K_W)
    b_out = tl.zeros([ROWS * BH * BW, BO], tl.float32)
    for i_c in range(0, C, BC):
        o_c = i_c + tl.arange(0, BC)[None, :]
        m_c = o_c < C if C % BC else tl.full([1, BC], True, tl.int1)
        prologue = load_prologue(p_scale, s_scale, p_shift, s_shift, i_b, o_c, m_c)
        sums = repeated(0.0, ROWS, BH * BW, BC)
        # A loop, for the compiler: it would compute what is not carried by one in the layout of the product's operand,
        # in several warps at once.
        for d_x in range(tl.maximum(d - K_D // 2, 0), tl.minimum(d + K_D // 2 + 1, D)):
            weights = ()
            for t in tl.static_range(K_H * K_W):
                # As wide as a tile of x, so that every thread loads the weights of its own channels.
                o_tap = tl.zeros([BH * BW, 1], tl.int32) + o_c + ((d_x - d + K_D // 2) * K_H * K_W + t) * C
                weights += (tl.load(p_taps + o_tap, mask=m_c, other=0.0),)
            p_plane = address(p_x, s_x, i_b, o_c, d_x, o_h, o_w)
            for i in tl.static_range(ROWS + K_H - 1):
                for t_w in tl.static_range(K_W):
                    o_neighbour = offset(i - K_H // 2, s_x[3]) + offset(t_w - K_W // 2, s_x[4])
                    b_y = load_input(p_plane + o_neighbour, m_rows[i] & m_columns[t_w] & m_c, prologue, RELU)
                    sums = add_taps(sums, b_y, i, t_w, weights, None, (), o_c, m_c, 1, K_H, K_W, ROWS)
        o_pointwise = offset(tl.trans(o_c), s_pointwise[1]) + offset(o_o, s_pointwise[0])
        b_pointwise = tl.load(p_pointwise + o_pointwise, mask=tl.trans(m_c) & (o_o < C_OUT), other=0.0)  # (BC, BO)
        b_between = stacked(sums, ROWS, BH * BW, BC).to(b_pointwise.dtype)
        b_out = tl.dot(b_between, b_pointwise, b_out, input_precision=PRECISION)
    o_m = tl.arange(0, ROWS * BH * BW)[:, None]
    o_h = first_row(o_m % (BH * BW), i_h, ROWS, BH, BW) + o_m // (BH * BW)
    o_w = column(o_m % (BH * BW), i_w, BW)
    m_out = (o_h < H) & (o_w < W) & (o_o < C_OUT)
    tl.store(address(p_out, s_out, i_b, o_o, d, o_h, o_w), b_out.to(p_out.dtype.element_ty), mask=m_out)


class Blocks(NamedTuple):
    """BH * BW positions, BC of their channels at a time and BO of out."""

    ROWS: int
    BH: int
    BW: int
    BC: int
    BO: int
    num_warps: int


def choose_blocks(x: Tensor, kernel: tuple[int, ...], c_out: int, prologue: bool) -> Blocks:
    """Blocks for `x` as the kernel sees it: those tuned for this GPU, else ones that do not spill."""
    _, c, d, h, w = x.shape
    k_d, k_h, k_w = kernel
    channels_last = x.stride(1) == 1
    layout = f"{channels_last=} {prologue=} bytes={x.element_size()}"
    key = f"{c}x{d}x{h}x{w} c_out={c_out} kernel={k_d}x{k_h}x{k_w} {layout}"
    by_rule = _blocks_by_rule((c, h, w), (k_h, k_w), c_out)
    return Blocks(**tuned("depthwise_separable_conv", x.device, key, by_rule._asdict()))


@functools.cache
def _blocks_by_rule(sizes: tuple[int, int, int], taps: tuple[int, int], c_out: int) -> Blocks:
    """Four values of a tile and 64 of the sum for a thread, 128 if all channels of out are to have one program."""
    c, h, w = sizes
    BO = min(256, max(16, power_of_two(c_out)))
    num_warps = 8 if BO > 128 else 4
    BC = 32 if c > 16 else 16
    ROWS = min(4, power_of_two(h))
    BH, BW = plane_block((h, w), taps, ROWS, num_warps * 32 * 4 // BC)
    return Blocks(ROWS, BH, BW, BC, BO, num_warps)


def _launch(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    relu: bool,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
) -> Tensor:
    b, c, *spatial = x.shape
    c_out = pointwise_weight.shape[0]
    channels_last = x.stride(1) == 1
    out = x.new_empty((b, *spatial, c_out)).movedim(-1, 1) if channels_last else x.new_empty((b, c_out, *spatial))
    if x.numel() == 0:
        return out
    axes = (0, *plane_axes(x, 1))
    x_, depthwise_, out_ = (view(t, axes) for t in (x, depthwise_weight, out))
    taps = depthwise_.squeeze(1).movedim(0, -1).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    pointwise_ = pointwise_weight.flatten(1)
    _, _, d, h, w = x_.shape
    k_d, k_h, k_w, _ = taps.shape
    blocks = choose_blocks(x_, (k_d, k_h, k_w), c_out, scale is not None)
    programs = b * d * cdiv(h, blocks.BH * blocks.ROWS) * cdiv(w, blocks.BW) * cdiv(c_out, blocks.BO)
    _kernel[(programs,)](
        x_, strides_of(x_), scale, strides_of(scale), shift, strides_of(shift),
        taps, pointwise_, pointwise_.stride(), out_, strides_of(out_),
        d, h, w,
        C=c, C_OUT=c_out, K_D=k_d, K_H=k_h, K_W=k_w,
        RELU=relu, PRECISION="tf32" if convolutions_in_tf32() else "ieee", num_stages=1, **blocks._asdict(),
    )  # fmt: skip
    return out


@on_device_of_tensors
def depthwise_separable_conv(x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor) -> Tensor:
    return _launch(x, None, None, False, depthwise_weight, pointwise_weight)


@on_device_of_tensors
def scaled_depthwise_separable_conv(
    x: Tensor, scale: Tensor, shift: Tensor, relu: bool, depthwise_weight: Tensor, pointwise_weight: Tensor
) -> Tensor:
    return _launch(x, scale, shift, relu, depthwise_weight, pointwise_weight)
