"""Depthwise convolution in 2D and 3D and its weight's gradient, with a scale, a shift and a ReLU in front of both.

With y = x, or [ReLU of] x * scale[b, c] + shift[b, c], zero outside of the map,

    out[b, c, p] = bias[c] + sum over taps t of weight[c, t] * y[b, c, p + t - k // 2]
    grad_weight[c, t] = sum over b, p of grad_out[b, c, p] * y[b, c, p + t - k // 2]

Instructions decide, not memory: an H200 has time for 31 of them per element while it copies one in bfloat16, and a
3x3x3 kernel multiplies 27 times. So what else there is per element must be little:

* A program walks along one axis, D. A plane that it has read is added to the sums of all K_D planes that it touches,
  which then move on by one: K_H * K_W loads per element instead of K_D * K_H * K_W.
* In the plane a position stands for ROWS successive ones along H, which share loads: (ROWS + K_H - 1) * K_W for ROWS of
  them, 4.5 per element at 3x3x3 and ROWS = 4.
* A thread loads several channels at once and converts them to float32 when they come; the weights of its channels, or
  in the other kernel their gradients, stay in registers. What the next plane needs first is loaded a plane ahead.

That makes 39 instructions per element at 3x3x3 and 16 at 3x3.

The kernels see a map as (B, C, D, H, W); `view` decides which axis of the map each of D, H and W is. A block is
[BH * BW positions, BC channels].
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from utnetv2_fast.kernels.launch import (
    cdiv,
    multiprocessors,
    on_device_of_tensors,
    power_of_two,
    tuned,
)


@triton.jit
def inside(i, n):
    return (i >= 0) & (i < n)


@triton.jit
def to_float32(b_x):
    """Of bfloat16 by its bits: one instruction an element, where the compiler's own conversion takes up to two."""
    if b_x.dtype == tl.bfloat16:
        b_bits = b_x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return b_bits.to(tl.float32, bitcast=True)
    return b_x.to(tl.float32)


@triton.jit
def offset(i, stride):
    return tl.cast(i, tl.int64) * stride


@triton.jit
def load_prologue(p_scale, s_scale, p_shift, s_shift, i_b, o_c, m_c):
    """(scale, shift) of the channels, or () without any."""
    prologue = ()
    if p_scale is not None:
        b_scale = tl.load(p_scale + offset(i_b, s_scale[0]) + offset(o_c, s_scale[1]), mask=m_c, other=0.0)
        b_shift = tl.load(p_shift + offset(i_b, s_shift[0]) + offset(o_c, s_shift[1]), mask=m_c, other=0.0)
        prologue = (b_scale, b_shift)
    return prologue


@triton.jit
def load_input(p_x, m, prologue, RELU: tl.constexpr):
    """y as float32; zero where not `m`."""
    b_y = to_float32(tl.load(p_x, mask=m, other=0.0))
    if len(prologue) > 0:
        b_y = b_y * prologue[0] + prologue[1]
        if RELU:
            b_y = tl.maximum(b_y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        b_y = tl.where(m, b_y, 0.0)
    return b_y


@triton.jit
def load_tap(p_weight, s_weight, o_c, m_c, t_d, t_h, t_w):
    """One tap of the channels' kernels as float32."""
    o = offset(o_c, s_weight[0]) + offset(t_d, s_weight[2]) + offset(t_h, s_weight[3]) + offset(t_w, s_weight[4])
    return to_float32(tl.load(p_weight + o, mask=m_c, other=0.0))


@triton.jit
def locate(i_block, H, W, chunks, ROWS: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr):
    """Which batch item, chunk of D, strip of rows and strip of columns a block is."""
    blocks_h, blocks_w = tl.cdiv(H, BH * ROWS), tl.cdiv(W, BW)
    i_plane = i_block // blocks_w // blocks_h
    return i_plane // chunks, i_plane % chunks, i_block // blocks_w % blocks_h, i_block % blocks_w


@triton.jit
def first_row(o_p, i_h, ROWS: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr):
    """Of the ROWS that positions o_p of a block stand for."""
    return (i_h * BH + o_p // BW) * ROWS


@triton.jit
def column(o_p, i_w, BW: tl.constexpr):
    return i_w * BW + o_p % BW


@triton.jit
def address(p_x, s_x, i_b, o_c, d, o_h, o_w):
    o_x = offset(i_b, s_x[0]) + offset(d, s_x[2]) + offset(o_h, s_x[3]) + offset(o_w, s_x[4])
    return p_x + o_x + offset(o_c, s_x[1])


@triton.jit
def masks_around(o, n, N: tl.constexpr, TAPS: tl.constexpr):
    """Which of the coordinates o - TAPS // 2 and the N - 1 behind it are in range(n)."""
    masks = ()
    for i in tl.static_range(N):
        masks += (inside(o + (i - TAPS // 2), n),)
    return masks


@triton.jit
def _load_rows(p_x, s_x, m_rows, m, prologue, RELU: tl.constexpr, ROWS: tl.constexpr):
    """y of a plane at the block's own rows, a tuple."""
    rows = ()
    for r in tl.static_range(ROWS):
        rows += (load_input(p_x + offset(r, s_x[3]), m_rows[r] & m, prologue, RELU),)
    return rows


@triton.jit
def _own_or_loaded(own, p_x, s_x, m, prologue, RELU: tl.constexpr, i: tl.constexpr, j: tl.constexpr):
    """y of a plane, i rows and j columns away: of the block's own rows, or loaded."""
    if j == 0 and i >= 0 and i < len(own):
        b_y = own[i]
    else:
        b_y = load_input(p_x + offset(i, s_x[3]) + offset(j, s_x[4]), m, prologue, RELU)
    return b_y


@triton.jit
def repeated(b, N: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(N):
        tiles += (tl.zeros([BP, BC], tl.float32) + b,)
    return tiles


@triton.jit
def add_taps(
    sums, b_y, i: tl.constexpr, t_w: tl.constexpr, weights, p_weight, s_weight, o_c, m_c,
    K_D: tl.constexpr, K_H: tl.constexpr, K_W: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds what input row i (of ROWS + K_H - 1) weighs in K_D planes of ROWS rows; sums[t * ROWS + r], oldest first."""
    added = ()
    for t in tl.static_range(K_D):
        for r in tl.static_range(ROWS):
            b_sum = sums[t * ROWS + r]
            if i >= r and i - r < K_H:
                if len(weights) > 0:
                    b_sum += b_y * weights[((K_D - 1 - t) * K_H + i - r) * K_W + t_w]
                else:
                    b_sum += b_y * load_tap(p_weight, s_weight, o_c, m_c, K_D - 1 - t, i - r, t_w)
            added += (b_sum,)
    return added


@triton.jit
def _store_rows(p_out, s_out, m_rows, m, sums, ROWS: tl.constexpr):
    for r in tl.static_range(ROWS):
        tl.store(p_out + offset(r, s_out[3]), sums[r].to(p_out.dtype.element_ty), mask=m_rows[r] & m)


@triton.jit(do_not_specialize=["D", "H", "chunk", "chunks"])
def _forward_kernel(
    p_x, s_x,  # (B, C, D, H, W)
    p_weight, s_weight,  # (C, 1, K_D, K_H, K_W)
    p_bias, s_bias,  # (C,) or None
    p_scale, s_scale, p_shift, s_shift,  # (B, C) or None
    p_out, s_out,  # (B, C, D, H, W)
    D, H, W, chunk, chunks,
    C: tl.constexpr, K_D: tl.constexpr, K_H: tl.constexpr, K_W: tl.constexpr, RELU: tl.constexpr,
    ROWS: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, HOLDS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    blocks_c: tl.constexpr = (C + BC - 1) // BC
    i_b, i_chunk, i_h, i_w = locate(tl.program_id(0) // blocks_c, H, W, chunks, ROWS, BH, BW)
    o_p = tl.arange(0, BH * BW)[:, None]
    o_h, o_w = first_row(o_p, i_h, ROWS, BH, BW), column(o_p, i_w, BW)
    o_c = (tl.program_id(0) % blocks_c * BC + tl.arange(0, BC))[None, :]
    m_c = o_c < C if C % BC else tl.full([1, BC], True, tl.int1)
    m_rows, m_columns = masks_around(o_h, H, ROWS + K_H - 1, K_H), masks_around(o_w, W, K_W, K_W)
    m_own_rows, m_own = m_rows[K_H // 2 :], m_columns[K_W // 2] & m_c
    prologue = load_prologue(p_scale, s_scale, p_shift, s_shift, i_b, o_c, m_c)
    weights = ()
    if HOLDS_WEIGHTS:
        for t_d in tl.static_range(K_D):
            for t_h in tl.static_range(K_H):
                for t_w in tl.static_range(K_W):
                    weights += (load_tap(p_weight, s_weight, o_c, m_c, t_d, t_h, t_w),)
    b_bias = 0.0
    if p_bias is not None:
        b_bias = to_float32(tl.load(p_bias + offset(o_c, s_bias[0]), mask=m_c, other=0.0))

    first, last = i_chunk * chunk, tl.minimum(i_chunk * chunk + chunk, D)
    start, end = tl.maximum(first - K_D // 2, 0), tl.minimum(last + K_D // 2, D)
    p_x = address(p_x, s_x, i_b, o_c, start, o_h, o_w)
    p_out = address(p_out, s_out, i_b, o_c, start - K_D // 2, o_h, o_w)
    sums = repeated(b_bias, K_D * ROWS, BH * BW, BC)
    ahead = _load_rows(p_x, s_x, m_own_rows, m_own, prologue, RELU, ROWS)
    for d in range(start, end):
        own = ahead
        p_next = p_x + offset(1, s_x[2])
        ahead = _load_rows(p_next, s_x, m_own_rows, m_own & (d + 1 < end), prologue, RELU, ROWS)
        for i in tl.static_range(ROWS + K_H - 1):
            for t_w in tl.static_range(K_W):
                m = m_rows[i] & m_columns[t_w] & m_c
                b_y = _own_or_loaded(own, p_x, s_x, m, prologue, RELU, i - K_H // 2, t_w - K_W // 2)
                sums = add_taps(sums, b_y, i, t_w, weights, p_weight, s_weight, o_c, m_c, K_D, K_H, K_W, ROWS)
        _store_rows(p_out, s_out, m_own_rows, m_own & (d - K_D // 2 >= first), sums, ROWS)
        sums = sums[ROWS:] + repeated(b_bias, ROWS, BH * BW, BC)
        p_x = p_next
        p_out += offset(1, s_out[2])
    # Behind the last plane of the map there is nothing more to add.
    for t in tl.static_range(K_D // 2):
        m_plane = inside(end - K_D // 2 + t - first, last - first)
        _store_rows(p_out, s_out, m_own_rows, m_own & m_plane, sums[t * ROWS :], ROWS)
        p_out += offset(1, s_out[2])


@triton.jit
def _add_products(
    sums, b_y, i: tl.constexpr, t_w: tl.constexpr, grads,
    K_D: tl.constexpr, K_H: tl.constexpr, K_W: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds input row i (of ROWS + K_H - 1) times K_D planes of ROWS rows grads[t * ROWS + r], oldest first."""
    added = ()
    for t_d in tl.static_range(K_D):
        for t_h in tl.static_range(K_H):
            for w in tl.static_range(K_W):
                b_sum = sums[(t_d * K_H + t_h) * K_W + w]
                if w == t_w and i >= t_h and i - t_h < ROWS:
                    b_sum += b_y * grads[(K_D - 1 - t_d) * ROWS + i - t_h]
                added += (b_sum,)
    return added


@triton.jit(do_not_specialize=["D", "H", "chunk", "chunks", "blocks"])
def _backward_weight_kernel(
    p_grad, s_grad,  # (B, C, D, H, W)
    p_x, s_x,  # (B, C, D, H, W)
    p_scale, s_scale, p_shift, s_shift,  # (B, C) or None
    p_parts,  # (shares, K_D, K_H, K_W, C)
    D, H, W, chunk, chunks, blocks,
    C: tl.constexpr, K_D: tl.constexpr, K_H: tl.constexpr, K_W: tl.constexpr, RELU: tl.constexpr,
    TAPS_H: tl.constexpr, ROWS: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    blocks_c: tl.constexpr = (C + BC - 1) // BC
    o_p = tl.arange(0, BH * BW)[:, None]
    o_c = (tl.program_id(0) % blocks_c * BC + tl.arange(0, BC))[None, :]
    m_c = o_c < C if C % BC else tl.full([1, BC], True, tl.int1)
    first_tap = tl.program_id(0) // blocks_c * TAPS_H if TAPS_H < K_H else 0
    i_share, shares = tl.program_id(1), tl.num_programs(1)

    sums = repeated(0.0, K_D * TAPS_H * K_W, BH * BW, BC)
    for i_block in range(i_share, blocks, shares):
        i_b, i_chunk, i_h, i_w = locate(i_block, H, W, chunks, ROWS, BH, BW)
        o_h, o_w = first_row(o_p, i_h, ROWS, BH, BW), column(o_p, i_w, BW)
        o_h_x = o_h + first_tap + (TAPS_H // 2 - K_H // 2)  # the row that the middle one of these taps falls on
        m_rows, m_columns = masks_around(o_h_x, H, ROWS + TAPS_H - 1, TAPS_H), masks_around(o_w, W, K_W, K_W)
        m_x_rows, m_grad_rows = m_rows[TAPS_H // 2 :], masks_around(o_h, H, ROWS, 1)
        m_own = m_columns[K_W // 2] & m_c
        prologue = load_prologue(p_scale, s_scale, p_shift, s_shift, i_b, o_c, m_c)
        first, last = i_chunk * chunk, tl.minimum(i_chunk * chunk + chunk, D)
        p_x_plane = address(p_x, s_x, i_b, o_c, first, o_h_x, o_w)
        p_grad_plane = address(p_grad, s_grad, i_b, o_c, first - K_D // 2, o_h, o_w)
        grads = ()
        for t in tl.static_range(K_D - 1):
            m_plane = inside(first - K_D // 2 + t, D)
            grads += _load_rows(p_grad_plane, s_grad, m_grad_rows, m_own & m_plane, (), False, ROWS)
            p_grad_plane += offset(1, s_grad[2])
        own_ahead = _load_rows(p_x_plane, s_x, m_x_rows, m_own, prologue, RELU, ROWS)
        m_plane = first + K_D // 2 < D
        grads_ahead = _load_rows(p_grad_plane, s_grad, m_grad_rows, m_own & m_plane, (), False, ROWS)
        for d in range(first, last):
            own = own_ahead
            grads += grads_ahead
            p_next = p_x_plane + offset(1, s_x[2])
            p_grad_plane += offset(1, s_grad[2])
            m_next = m_own & (d + 1 < last)
            own_ahead = _load_rows(p_next, s_x, m_x_rows, m_next, prologue, RELU, ROWS)
            m_next &= d + 1 + K_D // 2 < D
            grads_ahead = _load_rows(p_grad_plane, s_grad, m_grad_rows, m_next, (), False, ROWS)
            for i in tl.static_range(ROWS + TAPS_H - 1):
                for t_w in tl.static_range(K_W):
                    m = m_rows[i] & m_columns[t_w] & m_c
                    b_y = _own_or_loaded(own, p_x_plane, s_x, m, prologue, RELU, i - TAPS_H // 2, t_w - K_W // 2)
                    sums = _add_products(sums, b_y, i, t_w, grads, K_D, TAPS_H, K_W, ROWS)
            grads = grads[ROWS:]
            p_x_plane = p_next

    p_parts += offset(i_share, K_D * K_H * K_W * C) + o_c
    for t_d in tl.static_range(K_D):
        for t_h in tl.static_range(TAPS_H):
            for t_w in tl.static_range(K_W):
                o_tap = ((t_d * K_H + first_tap + t_h) * K_W + t_w) * C
                b_sum = tl.sum(sums[(t_d * TAPS_H + t_h) * K_W + t_w], 0, keep_dims=True)
                tl.store(p_parts + o_tap, b_sum, mask=m_c & (first_tap + t_h < K_H))


class Blocks(NamedTuple):
    """How the work is cut: ROWS of a position, BH * BW positions and BC channels of a block.

    D is cut for `occupancy` programs at a time on every multiprocessor.
    """

    ROWS: int
    BH: int
    BW: int
    BC: int
    num_warps: int
    occupancy: int

    def of_launch(self) -> dict[str, int]:
        return {name: value for name, value in self._asdict().items() if name != "occupancy"}


class _Map(NamedTuple):
    """What a launcher decides by: a map as the kernels see it, and the kernel of the convolution in the same order."""

    shape: tuple[int, ...]  # (B, C, D, H, W)
    kernel: tuple[int, ...]  # (K_D, K_H, K_W)
    channels_last: bool
    itemsize: int
    prologue: bool


# Registers of a thread for its channels' weights, or the sums that become their gradients, by bytes of an element.
HELD = {2: 112, 4: 64}
MOST_HELD = 128  # taps of a kernel whose weights are held, of one channel at least; else they are loaded where needed
MOST_WALKED = 7  # taps of the axis that is walked, each of which needs sums
THREADS = 128


def _axes(x: Tensor, kernel: tuple[int, ...]) -> tuple[int, int, int]:
    """Which of the map's last three axes are D, H and W of the kernels: D is the longer of the first two with taps."""
    *taps, _ = (1,) * (5 - x.ndim) + kernel
    *lengths, _ = (1,) * (5 - x.ndim) + tuple(x.shape[2:])

    def worth(axis: int) -> tuple[bool, int, int]:
        return 1 < taps[axis] <= MOST_WALKED, -max(taps[axis], MOST_WALKED), lengths[axis]

    walked = max((0, 1), key=worth)
    return (walked, *plane_axes(x, 1 - walked))


def plane_axes(x: Tensor, other: int) -> tuple[int, int]:
    """Which of the map's last three axes are H and W of the kernels, of the innermost and the `other`.

    Channels-last, H is the innermost: the distance of its rows is then known when a kernel is compiled, and addresses
    are one addition. Else W is, whose elements are adjacent.
    """
    return (2, other) if x.stride(1) == 1 else (other, 2)


def view(x: Tensor, axes: tuple[int, int, int]) -> Tensor:
    """The map, or the weight, as the kernels see it: (B, C, D, H, W)."""
    return (x if x.ndim == 5 else x.unsqueeze(2)).permute(0, 1, *(2 + axis for axis in axes))


def _described(view: Tensor, kernel: tuple[int, ...], scale: Tensor | None) -> _Map:
    return _Map(tuple(view.shape), kernel, view.stride(1) == 1, view.element_size(), scale is not None)


def strides_of(x: Tensor | None) -> tuple[object, ...]:
    """Of H a constant where channels are adjacent: it is the number of channels then, and few occur."""
    if x is None:
        return ()
    strides = x.stride()
    return strides if x.ndim != 5 or strides[1] != 1 else (*strides[:3], tl.constexpr(strides[3]), strides[4])


def choose_blocks(name: str, device: torch.device, x: _Map, held: int) -> Blocks:
    """Blocks for kernel `name`, whose threads hold `held` values a channel: tuned for this GPU, else by rule."""
    _, c, d, h, w = x.shape
    k_d, k_h, k_w = x.kernel
    layout = f"channels_last={x.channels_last} prologue={x.prologue} bytes={x.itemsize}"
    key = f"{c}x{d}x{h}x{w} kernel={k_d}x{k_h}x{k_w} {layout}"
    return Blocks(**tuned(name, device, key, _blocks_by_rule(x, held)._asdict()))


@functools.cache
def _blocks_by_rule(x: _Map, held: int) -> Blocks:
    """Blocks that do not spill and read few elements twice."""
    _, c, _, h, w = x.shape
    k_d, k_h, k_w = x.kernel
    vector = max(v for v in (1, 2, 4) if v == 1 or v * held <= HELD[x.itemsize])
    ROWS = max(1, min(4, 48 // (k_d * vector))) if k_h > 1 else 1
    elements = THREADS * vector
    channels = 1
    if x.channels_last:
        channels = min(32, c & -c) if c % 16 == 0 else min(32, power_of_two(c))
    positions = min(elements // channels, power_of_two(cdiv(h, ROWS)) * power_of_two(w))
    BC = min(elements // positions, power_of_two(c))
    narrowest = 1 if x.channels_last else min(32, power_of_two(w))
    BH, BW = plane_block((h, w), (k_h, k_w), ROWS, positions, narrowest)
    return Blocks(ROWS, BH, BW, BC, num_warps=THREADS // 32, occupancy=2 if held > 9 else 3)


def plane_block(
    lengths: tuple[int, int], taps: tuple[int, int], ROWS: int, positions: int, narrowest: int = 1
) -> tuple[int, int]:
    """BH and BW, at least `narrowest`, of blocks of `positions` that read the fewest elements, repeats counted."""

    def elements_read(BH: int) -> int:
        rows, columns = BH * ROWS, positions // BH
        blocks = cdiv(lengths[0], rows) * cdiv(lengths[1], columns)
        return blocks * (rows + taps[0] - 1) * (columns + taps[1] - 1)

    heights = [1 << i for i in range(positions.bit_length()) if positions >> i >= narrowest]
    BH = min(heights or [1], key=elements_read)
    return BH, positions // BH


def _planes_of_blocks(x: _Map, blocks: Blocks) -> int:
    """Blocks of positions in all the planes that lie along D."""
    b, _, _, h, w = x.shape
    return b * cdiv(h, blocks.BH * blocks.ROWS) * cdiv(w, blocks.BW)


@functools.cache
def _chunk(length: int, columns: int, programs: int, extra: float) -> int:
    """Planes of D that a program walks, of each of `columns` blocks, for `programs` at a time to end soonest.

    Every walk costs `extra` planes.
    """
    most = min(length, 64)
    chunks = min(range(1, most + 1), key=lambda n: cdiv(columns * n, programs) * (cdiv(length, n) + extra))
    return cdiv(length, chunks)


def _held_by_prologue(scale: Tensor | None) -> int:
    """Scale and shift of a channel."""
    return 0 if scale is None else 2


def _launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, relu: bool
) -> Tensor:
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    axes = _axes(x, tuple(weight.shape[2:]))
    x_, weight_, out_ = (view(t, axes) for t in (x, weight, out))
    _, c, d, h, w = x_.shape
    k_d, k_h, k_w = kernel = tuple(weight_.shape[2:])
    described = _described(x_, kernel, scale)
    taps = math.prod(kernel)
    held = taps if taps <= MOST_HELD else 0
    blocks = choose_blocks("depthwise_conv", x.device, described, held + _held_by_prologue(scale))
    blocks_c = cdiv(c, blocks.BC)
    columns = _planes_of_blocks(described, blocks)
    chunk = _chunk(d, columns * blocks_c, blocks.occupancy * multiprocessors(x.device), k_d - 1)
    chunks = cdiv(d, chunk)
    _forward_kernel[(columns * chunks * blocks_c,)](
        x_, strides_of(x_), weight_, weight_.stride(), bias, strides_of(bias),
        scale, strides_of(scale), shift, strides_of(shift), out_, strides_of(out_),
        d, h, w, chunk, chunks,
        C=c, K_D=k_d, K_H=k_h, K_W=k_w, RELU=relu, HOLDS_WEIGHTS=held > 0, **blocks.of_launch(),
    )  # fmt: skip
    return out


@on_device_of_tensors
def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _launch_forward(x, weight, bias, None, None, False)


@on_device_of_tensors
def scaled_depthwise_conv(x: Tensor, scale: Tensor, shift: Tensor, relu: bool, weight: Tensor) -> Tensor:
    return _launch_forward(x, weight, None, scale, shift, relu)


def _launch_backward_weight(
    grad_out: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, relu: bool, weight: Tensor
) -> Tensor:
    if x.numel() == 0:
        return torch.zeros_like(weight)
    axes = _axes(x, tuple(weight.shape[2:]))
    grad_weight = torch.empty_like(weight)
    x_, grad_, grad_weight_ = (view(t, axes) for t in (x, grad_out, grad_weight))
    _, c, d, h, w = x_.shape
    k_d, k_h, k_w = kernel = tuple(grad_weight_.shape[2:])
    described = _described(x_, kernel, scale)
    TAPS_H = max(1, min(k_h, HELD[x.element_size()] // (k_d * k_w)))
    held = k_d * TAPS_H * k_w + _held_by_prologue(scale)
    blocks = choose_blocks("depthwise_conv_backward_weight", x.device, described, held)
    programs = cdiv(c, blocks.BC) * cdiv(k_h, TAPS_H)
    columns = _planes_of_blocks(described, blocks)
    shares = max(1, blocks.occupancy * multiprocessors(x.device) // programs)
    chunk = _chunk(d, columns, shares, (k_d - 1) / 4)
    chunks = cdiv(d, chunk)
    shares = min(shares, columns * chunks)
    parts = x.new_empty((shares, *kernel, c), dtype=torch.float32)
    _backward_weight_kernel[(programs, shares)](
        grad_, strides_of(grad_), x_, strides_of(x_), scale, strides_of(scale), shift, strides_of(shift), parts,
        d, h, w, chunk, chunks, columns * chunks,
        C=c, K_D=k_d, K_H=k_h, K_W=k_w, RELU=relu, TAPS_H=TAPS_H, **blocks.of_launch(),
    )  # fmt: skip
    grad_weight_.copy_(parts.sum(0).movedim(-1, 0).unsqueeze(1))
    return grad_weight


@on_device_of_tensors
def depthwise_conv_backward_weight(grad_out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return _launch_backward_weight(grad_out, x, None, None, False, weight)


@on_device_of_tensors
def scaled_depthwise_conv_backward_weight(
    grad_out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, relu: bool, weight: Tensor
) -> Tensor:
    return _launch_backward_weight(grad_out, x, scale, shift, relu, weight)
