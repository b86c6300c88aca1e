"""Bidirectional attention, forward and backward in one pass over the tokens each.

With S = scale * q map_q^T (n x l), which exists only as tiles on chip,

    R = softmax(S, over l)      out = R map_v              dR = dout map_v^T
    C = softmax(S, over n)      map_out = C^T v            dC = v dmap_out^T
    dS = scale * (R * (dR - rowsum(R * dR)) + C * (dC - colsum(dmap_out * map_out)))
    dq = dS map_q     dv = C dmap_out     dmap_q = dS^T q     dmap_v = R^T dout

The row softmax ends inside a tile. The tokens are split among programs; each keeps for its columns the largest exponent
so far, the sum of exponentials and the weighted sum of v, and a second kernel combines the splits. Backward has the
logarithms of the column sums, so that a tile is all it needs; its sums over tokens are partial ones per split as well.

One exponential serves both softmaxes. Forward, a program's E = exp2(S - reference), with one reference for all that it
has seen, is divided by its row sums for R; its column sums, and its products with v, are what C needs. Where row sums
leave the range in which that is exact, the reference follows the tile and the rows are computed on their own; where at
the end a column has vanished beside the others, a second loop computes the columns one by one. Backward, the reference
is the largest of the column's logarithms, and C is E times a factor for each column.

Elements moved: forward reads q and v and writes out, 3 n d; backward reads q, v, dout and writes dq, dv, 5 n d.
Operations: 6 and 14 for each of the n l d. At l = 32 in bfloat16 that is 32 and 45 a byte: a seventh and a fifth of the
matrix products that a GPU of 4.3 TB/s does meanwhile. One exponential a score costs more than the memory from l = 7 d
on, two from half of that.

Heads wider than BD channels are cut into slices of BD: a program has one slice of out and of the sums over tokens, and
computes S of all channels again.

Tiles of scores lie with their longer side first: (BN, BL) or, where there are more columns than rows, (BL, BN); L is
the axis along the semantic tokens. Warps of products that feed products Triton mostly stacks along the first axis, 16
rows each, and several have the same rows where there are too few.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from utnetv2_fast.kernels.launch import (
    architecture,
    cdiv,
    multiprocessors,
    on_device_of_tensors,
    power_of_two,
    tuned,
)
from utnetv2_fast.ops.precision import products_in_tf32

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # a reference before there is any; not infinite, so that -inf - LOWEST is -inf


class Blocks(NamedTuple):
    """How the work is cut: tokens and channels of a tile, and what Triton makes of a program."""

    BN: int
    BD: int
    num_warps: int
    num_stages: int


class Grid(NamedTuple):
    programs: tuple[int, int]  # splits of all heads, slices of channels
    splits: int


@triton.jit
def _exp(b_x, BITS: tl.constexpr):
    """Scores are in powers of two (BITS), which saves a multiplication each; in float32 that costs accuracy."""
    return tl.exp2(b_x) if BITS else tl.exp(b_x)


@triton.jit
def _log(b_x, BITS: tl.constexpr):
    return tl.log2(b_x) if BITS else tl.log(b_x)


@triton.jit
def _load(p_x, s_x, o_row, m_row, o_d, m_d):
    """Rows of one head of x, as a tile (rows, channels); zeros outside."""
    o_x = o_row.to(tl.int64)[:, None] * s_x[2] + o_d.to(tl.int64)[None, :] * s_x[3]
    return tl.load(p_x + o_x, mask=m_row[:, None] & m_d[None, :], other=0.0)


@triton.jit
def _store(p_x, s_x, o_row, m_row, o_d, m_d, b_x):
    o_x = o_row.to(tl.int64)[:, None] * s_x[2] + o_d.to(tl.int64)[None, :] * s_x[3]
    tl.store(p_x + o_x, b_x.to(p_x.dtype.element_ty), mask=m_row[:, None] & m_d[None, :])


@triton.jit
def _zeros(BN: tl.constexpr, BL: tl.constexpr, L: tl.constexpr):
    """A tile of scores."""
    return tl.zeros([BN, BL] if L == 1 else [BL, BN], tl.float32)


@triton.jit
def _per_row(b_x, L: tl.constexpr):
    """One value for each token, to go with a tile of scores."""
    return tl.expand_dims(b_x, L)


@triton.jit
def _per_column(b_x, L: tl.constexpr):
    """One value for each semantic token, to go with a tile of scores."""
    return tl.expand_dims(b_x, 1 - L)


@triton.jit
def _tile_product(b_x, b_map, b_product, L: tl.constexpr, PRECISION: tl.constexpr):
    """x map^T + product, a tile of scores, of x (BN, BD) and map (BL, BD)."""
    b_first, b_second = (b_x, b_map) if L == 1 else (b_map, b_x)
    return tl.dot(b_first, tl.trans(b_second), b_product, input_precision=PRECISION)


@triton.jit
def _token_product(b_tile, b_map, L: tl.constexpr, PRECISION: tl.constexpr):
    """tile map (BN, BD)."""
    return tl.dot(b_tile if L == 1 else tl.trans(b_tile), b_map, input_precision=PRECISION)


@triton.jit
def _map_product(b_tile, b_x, b_product, L: tl.constexpr, PRECISION: tl.constexpr):
    """tile^T x + product (BL, BD)."""
    return tl.dot(tl.trans(b_tile) if L == 1 else b_tile, b_x, b_product, input_precision=PRECISION)


@triton.jit
def _product_of_slices(
    p_x, s_x, o_n, m_n,  # a head of the token map (n, d)
    p_map, s_map, o_l, m_l,  # a head of the semantic map (l, d)
    D: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x map^T, a tile of scores, over all channels."""
    b_product = _zeros(BN, BL, L)
    for i_d in tl.range(0, D, BD, num_stages=1):  # a loop indeed: unrolled, its addresses take all registers
        o_d = i_d + tl.arange(0, BD)
        b_x = _load(p_x, s_x, o_n, m_n, o_d, o_d < D)
        b_map = _load(p_map, s_map, o_l, m_l, o_d, o_d < D)
        b_product = _tile_product(b_x, b_map, b_product, L, PRECISION)
    return b_product


@triton.jit
def _divided(b_e, b_row_sum, L: tl.constexpr, BITS: tl.constexpr):
    """Rows by their sums: in float32 a true division, so that a row of one is 1."""
    return b_e * _per_row(1.0 / b_row_sum, L) if BITS else b_e / _per_row(b_row_sum, L)


@triton.jit
def _row_softmax(b_s, m_n, L: tl.constexpr, BITS: tl.constexpr):
    b_top = tl.where(m_n, tl.max(b_s, L), 0.0)
    b_e = _exp(b_s - _per_row(b_top, L), BITS)
    return _divided(b_e, tl.where(m_n, tl.sum(b_e, L), 1.0), L, BITS)


@triton.jit
def _any(b_x):
    """Whether one of a vector is true, as a matrix: Triton 3.6 dies of vectors that come from tensor memory."""
    return tl.max(tl.reshape(b_x.to(tl.int32), [2, b_x.shape[0] // 2]), None) > 0


@triton.jit
def _masked(b_s, m_n, m_l, L: tl.constexpr):
    """A tile of scores, -inf outside."""
    return tl.where(_per_row(m_n, L) & _per_column(m_l, L), b_s, float("-inf"))


@triton.jit
def _scores(
    p_q, s_q, o_n, m_n,  # a head of the token map (n, d)
    p_map_q, s_map_q, o_l, m_l,  # a head of the semantic map (l, d)
    factor, D: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr, L: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """S * factor, a tile, -inf outside."""
    b_s = _product_of_slices(p_q, s_q, o_n, m_n, p_map_q, s_map_q, o_l, m_l, D, BN, BL, BD, L, PRECISION)
    return _masked(b_s * factor, m_n, m_l, L)


@triton.jit
def _forward_kernel(
    p_q, s_q, p_v, s_v,  # (B, H, n, d)
    p_map_q, s_map_q, p_map_v, s_map_v,  # (B, H, l, d)
    p_out, s_out,  # (B, H, n, d)
    p_references, p_sums,  # (B * H, splits, l)
    p_parts,  # (B * H, splits, l, d)
    n, l, heads, splits, scale,
    D: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
    UPDATES_MAP: tl.constexpr, LEAST: tl.constexpr, GREATEST: tl.constexpr, BITS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    L: tl.constexpr = 1 if BN >= BL else 0
    i_split = tl.program_id(0) % splits
    i_bh = (tl.program_id(0) // splits).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    factor = scale * LOG2E if BITS else scale
    p_q += i_b * s_q[0] + i_h * s_q[1]
    p_v += i_b * s_v[0] + i_h * s_v[1]
    p_map_q += i_b * s_map_q[0] + i_h * s_map_q[1]
    p_map_v += i_b * s_map_v[0] + i_h * s_map_v[1]
    p_out += i_b * s_out[0] + i_h * s_out[1]

    o_l = tl.arange(0, BL)
    m_l = o_l < l
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_map_v = _load(p_map_v, s_map_v, o_l, m_l, o_d, m_d)  # (BL, BD)
    if D <= BD:
        b_map_q = _load(p_map_q, s_map_q, o_l, m_l, o_d, m_d)
    b_reference = LOWEST
    b_sums = _zeros(BN, BL, L)  # of the rows' exponentials; over the rows at the end
    b_part = tl.zeros([BL, BD], tl.float32)

    tiles = tl.cdiv(n, BN)
    tiles_of_split = tl.cdiv(tiles, splits)
    first, last = i_split * tiles_of_split, min((i_split + 1) * tiles_of_split, tiles)
    for i_tile in range(first, last):
        o_n = i_tile * BN + tl.arange(0, BN)
        m_n = o_n < n
        if D <= BD:
            b_q = _load(p_q, s_q, o_n, m_n, o_d, m_d)  # (BN, BD)
            b_s = _tile_product(b_q, b_map_q, _zeros(BN, BL, L), L, PRECISION)
            b_s = _masked(b_s * factor, m_n, m_l, L)
        else:
            b_s = _scores(p_q, s_q, o_n, m_n, p_map_q, s_map_q, o_l, m_l, factor, D, BN, BL, BD, L, PRECISION)
        if UPDATES_MAP:
            b_v = _load(p_v, s_v, o_n, m_n, o_d, m_d)
            b_e = _exp(b_s - b_reference, BITS)
            b_row_sum = tl.where(m_n, tl.sum(b_e, L), 1.0)
            if _any((b_row_sum < LEAST) | (b_row_sum > GREATEST)):
                b_top = tl.maximum(b_reference, tl.max(b_s, None))
                b_kept = _exp(b_reference - b_top, BITS)
                b_sums *= b_kept
                b_part *= b_kept
                b_reference = b_top
                b_e = _exp(b_s - b_top, BITS)
                b_rows = _row_softmax(b_s, m_n, L, BITS)
            else:
                b_rows = _divided(b_e, b_row_sum, L, BITS)
            # The sums are of what the product sees: its weights then add up to one, however they are rounded.
            b_weights = b_e.to(b_v.dtype)
            b_sums += b_weights.to(tl.float32)
            b_part = _map_product(b_weights, b_v, b_part, L, PRECISION)
        else:
            b_rows = _row_softmax(b_s, m_n, L, BITS)
        b_out = _token_product(b_rows.to(b_map_v.dtype), b_map_v, L, PRECISION)
        _store(p_out, s_out, o_n, m_n, o_d, m_d, b_out)

    if UPDATES_MAP:
        b_sum = tl.sum(b_sums, 1 - L)
        b_references = tl.zeros([BL], tl.float32) + b_reference
        if (tl.min(tl.where(m_l, b_sum, 1.0), 0) < LEAST) & (first < last):
            # A column has vanished beside the others: each with a reference of its own.
            b_references = tl.full([BL], LOWEST, tl.float32)
            b_sum = tl.zeros([BL], tl.float32)
            b_part = tl.zeros([BL, BD], tl.float32)
            for i_tile in range(first, last):
                o_n = i_tile * BN + tl.arange(0, BN)
                m_n = o_n < n
                b_s = _scores(p_q, s_q, o_n, m_n, p_map_q, s_map_q, o_l, m_l, factor, D, BN, BL, BD, L, PRECISION)
                b_tops = tl.maximum(b_references, tl.max(b_s, 1 - L))
                b_kept = _exp(b_references - b_tops, BITS)
                b_references = b_tops
                b_v = _load(p_v, s_v, o_n, m_n, o_d, m_d)
                b_weights = _exp(b_s - _per_column(b_tops, L), BITS).to(b_v.dtype)
                b_sum = b_sum * b_kept + tl.sum(b_weights.to(tl.float32), 1 - L)
                b_part = _map_product(b_weights, b_v, b_part * b_kept[:, None], L, PRECISION)
    if UPDATES_MAP:
        o_column = (i_bh * splits + i_split) * l + o_l
        tl.store(p_parts + o_column[:, None] * D + o_d[None, :], b_part, mask=m_l[:, None] & m_d[None, :])
        # Every slice of channels has the same; all may write it.
        tl.store(p_references + o_column, b_references, mask=m_l)
        tl.store(p_sums + o_column, b_sum, mask=m_l)


@triton.jit
def _combine_kernel(
    p_references, p_sums,  # (B * H, splits, l)
    p_parts,  # (B * H, splits, l, d)
    p_map_out, s_map_out,  # (B, H, l, d)
    p_column_lse,  # (B * H, l), as the forward kernel leaves it
    l, heads, splits,
    D: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """map_out and the logarithm of the column sums from what the splits found; BE elements, BS splits at a time."""
    i_bh = tl.program_id(0).to(tl.int64)
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)
    m_e = o_e < l * D
    o_l, o_d = (o_e // D).to(tl.int64), (o_e % D).to(tl.int64)
    b_reference = tl.full([BE], float("-inf"), tl.float32)
    b_sum = tl.zeros([BE], tl.float32)
    b_out = tl.zeros([BE], tl.float32)
    for i_split in range(0, splits, BS):
        o_split = i_split + tl.arange(0, BS)
        m = (o_split < splits)[:, None] & m_e[None, :]
        o_column = (i_bh * splits + o_split)[:, None] * l + o_l[None, :]
        b_references = tl.load(p_references + o_column, mask=m, other=float("-inf"))  # (BS, BE)
        b_top = tl.maximum(b_reference, tl.where(m_e, tl.max(b_references, 0), 0.0))
        b_kept, b_weights = _exp(b_reference - b_top, BITS), _exp(b_references - b_top[None, :], BITS)
        b_sums = tl.load(p_sums + o_column, mask=m, other=0.0)
        b_parts = tl.load(p_parts + o_column * D + o_d[None, :], mask=m, other=0.0)
        b_sum = b_sum * b_kept + tl.sum(b_sums * b_weights, 0)
        b_out = b_out * b_kept + tl.sum(b_parts * b_weights, 0)
        b_reference = b_top
    b_sum = tl.where(m_e, b_sum, 1.0)
    p_map_out += (i_bh // heads) * s_map_out[0] + (i_bh % heads) * s_map_out[1]
    b_out = (b_out / b_sum).to(p_map_out.dtype.element_ty)
    tl.store(p_map_out + o_l * s_map_out[2] + o_d * s_map_out[3], b_out, mask=m_e)
    tl.store(p_column_lse + i_bh * l + o_l, b_reference + _log(b_sum, BITS), mask=m_e & (o_d == 0))


@triton.jit
def _backward_kernel(
    p_grad_out, s_grad_out,  # (B, H, n, d)
    p_grad_map_out, s_grad_map_out,  # (B, H, l, d)
    p_q, s_q, p_v, s_v,  # (B, H, n, d)
    p_map_q, s_map_q, p_map_v, s_map_v, p_map_out, s_map_out,  # (B, H, l, d)
    p_column_lse,  # (B * H, l), as the forward kernel leaves it
    p_grad_q, s_grad_q, p_grad_v, s_grad_v,  # (B, H, n, d)
    p_parts,  # (2, B * H, splits, l, d): of the gradients of map_q and map_v
    n, l, heads, splits, scale, o_second_part,
    D: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr,
    UPDATES_MAP: tl.constexpr, LEAST: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    L: tl.constexpr = 1 if BN >= BL else 0
    i_split = tl.program_id(0) % splits
    i_bh = (tl.program_id(0) // splits).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    factor = scale * LOG2E if BITS else scale
    p_grad_out += i_b * s_grad_out[0] + i_h * s_grad_out[1]
    p_grad_map_out += i_b * s_grad_map_out[0] + i_h * s_grad_map_out[1]
    p_q += i_b * s_q[0] + i_h * s_q[1]
    p_v += i_b * s_v[0] + i_h * s_v[1]
    p_map_q += i_b * s_map_q[0] + i_h * s_map_q[1]
    p_map_v += i_b * s_map_v[0] + i_h * s_map_v[1]
    p_map_out += i_b * s_map_out[0] + i_h * s_map_out[1]
    p_grad_q += i_b * s_grad_q[0] + i_h * s_grad_q[1]
    p_grad_v += i_b * s_grad_v[0] + i_h * s_grad_v[1]

    o_l = tl.arange(0, BL)
    m_l = o_l < l
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_map_q = _load(p_map_q, s_map_q, o_l, m_l, o_d, m_d)  # (BL, BD)
    if D <= BD:
        b_map_v = _load(p_map_v, s_map_v, o_l, m_l, o_d, m_d)
    if UPDATES_MAP:
        b_grad_map_out = _load(p_grad_map_out, s_grad_map_out, o_l, m_l, o_d, m_d)
        b_lse = tl.load(p_column_lse + i_bh * l + o_l, mask=m_l, other=float("-inf"))
        b_reference = tl.max(b_lse, 0)
        b_lse = tl.where(m_l, b_lse, b_reference)
        b_factors = _exp(b_reference - b_lse, BITS)
        vanishing = tl.max(b_factors, 0) * LEAST > 1.0
        b_column_sum = tl.zeros([BL], tl.float32)
        for i_d in tl.static_range(0, D, BD):
            o_k = i_d + tl.arange(0, BD)
            b_map_out = _load(p_map_out, s_map_out, o_l, m_l, o_k, o_k < D).to(tl.float32)
            b_grad = _load(p_grad_map_out, s_grad_map_out, o_l, m_l, o_k, o_k < D).to(tl.float32)
            b_column_sum += tl.sum(b_grad * b_map_out, 1)
    b_grad_map_q = tl.zeros([BL, BD], tl.float32)
    b_grad_map_v = tl.zeros([BL, BD], tl.float32)

    tiles = tl.cdiv(n, BN)
    tiles_of_split = tl.cdiv(tiles, splits)
    for i_tile in range(i_split * tiles_of_split, min((i_split + 1) * tiles_of_split, tiles)):
        o_n = i_tile * BN + tl.arange(0, BN)
        m_n = o_n < n
        b_q = _load(p_q, s_q, o_n, m_n, o_d, m_d)  # (BN, BD)
        b_grad_out = _load(p_grad_out, s_grad_out, o_n, m_n, o_d, m_d)
        if D <= BD:
            b_s = _tile_product(b_q, b_map_q, _zeros(BN, BL, L), L, PRECISION)
            b_s = _masked(b_s * factor, m_n, m_l, L)
            b_grad_rows = _tile_product(b_grad_out, b_map_v, _zeros(BN, BL, L), L, PRECISION)
        else:
            b_s = _scores(p_q, s_q, o_n, m_n, p_map_q, s_map_q, o_l, m_l, factor, D, BN, BL, BD, L, PRECISION)
            b_grad_rows = _product_of_slices(
                p_grad_out, s_grad_out, o_n, m_n, p_map_v, s_map_v, o_l, m_l, D, BN, BL, BD, L, PRECISION
            )
        if UPDATES_MAP:
            b_e = _exp(b_s - b_reference, BITS)
            b_row_sum = tl.where(m_n, tl.sum(b_e, L), 1.0)
            if _any(b_row_sum < LEAST) | vanishing:
                b_rows = _row_softmax(b_s, m_n, L, BITS)
                b_columns = _exp(b_s - _per_column(b_lse, L), BITS)
            else:
                b_rows = _divided(b_e, b_row_sum, L, BITS)
                b_columns = b_e * _per_column(b_factors, L)
        else:
            b_rows = _row_softmax(b_s, m_n, L, BITS)
        b_mean = tl.sum(b_rows * b_grad_rows, L)
        b_grad_s = b_rows * (b_grad_rows - _per_row(b_mean, L))
        b_rows_ = b_rows.to(b_grad_out.dtype)
        b_grad_map_v = _map_product(b_rows_, b_grad_out, b_grad_map_v, L, PRECISION)
        if UPDATES_MAP:
            if D <= BD:
                b_v = _load(p_v, s_v, o_n, m_n, o_d, m_d)
                b_grad_columns = _tile_product(b_v, b_grad_map_out, _zeros(BN, BL, L), L, PRECISION)
            else:
                b_grad_columns = _product_of_slices(
                    p_v, s_v, o_n, m_n, p_grad_map_out, s_grad_map_out, o_l, m_l, D, BN, BL, BD, L, PRECISION
                )
            b_grad_s += b_columns * (b_grad_columns - _per_column(b_column_sum, L))
            b_grad_v = _token_product(b_columns.to(b_grad_map_out.dtype), b_grad_map_out, L, PRECISION)
            _store(p_grad_v, s_grad_v, o_n, m_n, o_d, m_d, b_grad_v)
        b_grad_s_ = (b_grad_s * scale).to(b_q.dtype)
        b_grad_q = _token_product(b_grad_s_, b_map_q, L, PRECISION)
        _store(p_grad_q, s_grad_q, o_n, m_n, o_d, m_d, b_grad_q)
        b_grad_map_q = _map_product(b_grad_s_, b_q, b_grad_map_q, L, PRECISION)

    o_part = ((i_bh * splits + i_split) * l + o_l)[:, None] * D + o_d[None, :]
    m_part = m_l[:, None] & m_d[None, :]
    tl.store(p_parts + o_part, b_grad_map_q, mask=m_part)
    tl.store(p_parts + o_second_part + o_part, b_grad_map_v, mask=m_part)


@triton.jit
def _sum_kernel(
    p_parts,  # (2, B * H, splits, l, d)
    p_grad_map_q, s_grad_map_q, p_grad_map_v, s_grad_map_v,  # (B, H, l, d)
    l, heads, splits, o_second_part,
    D: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Sums over the splits; BE elements of one gradient of a head, BS splits at a time."""
    i_bh = tl.program_id(0).to(tl.int64)
    of_map_v = tl.program_id(2) == 1
    p_parts += of_map_v.to(tl.int64) * o_second_part
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)
    m_e = o_e < l * D
    b_total = tl.zeros([BE], tl.float32)
    for i_split in range(0, splits, BS):
        o_split = i_split + tl.arange(0, BS)
        m = (o_split < splits)[:, None] & m_e[None, :]
        o_parts = (i_bh * splits + o_split)[:, None] * (l * D) + o_e[None, :]
        b_total += tl.sum(tl.load(p_parts + o_parts, mask=m, other=0.0), 0)
    o_l, o_d = (o_e // D).to(tl.int64), (o_e % D).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    b_total = b_total.to(p_grad_map_q.dtype.element_ty)
    if of_map_v:
        o_grad = i_b * s_grad_map_v[0] + i_h * s_grad_map_v[1] + o_l * s_grad_map_v[2] + o_d * s_grad_map_v[3]
        tl.store(p_grad_map_v + o_grad, b_total, mask=m_e)
    else:
        o_grad = i_b * s_grad_map_q[0] + i_h * s_grad_map_q[1] + o_l * s_grad_map_q[2] + o_d * s_grad_map_q[3]
        tl.store(p_grad_map_q + o_grad, b_total, mask=m_e)


def choose_blocks(q: Tensor, l: int, *, updates_map: bool, backward: bool) -> Blocks:
    """Blocks for `q` (B, H, n, d) beside `l` semantic tokens: those tuned for this GPU, else ones that do not spill."""
    d, name = q.shape[3], "bidirectional_attention_backward" if backward else "bidirectional_attention"
    BL = power_of_two(max(l, 16))
    innermost = "d" if q.stride(3) <= q.stride(2) else "n"
    key = f"l={BL} d={d} {updates_map=} {innermost=!s} bytes={q.element_size()}"
    by_rule = _blocks_by_rule(BL, power_of_two(max(d, 16)), q.element_size(), architecture(q.device), backward)
    return Blocks(**tuned(name, q.device, key, by_rule._asdict()))


@functools.cache
def _blocks_by_rule(BL: int, d: int, itemsize: int, architecture: str, backward: bool) -> Blocks:
    """Registers decide: backward holds two sums (BL, BD) beside its tiles of scores, and the maps of whole heads."""
    BD = min(d, 128 if itemsize == 2 else 64)
    BD = min(BD, 64) if BL >= 128 else BD
    BN = max(16, min(64, max(32, 2048 // BL), (2048 if architecture.startswith("gfx") else 4096) // BD))
    if backward:
        BN = 64 if BL * BD <= 1024 else 16 if BL >= 64 and BD == d >= 128 else 32
    if itemsize == 4:  # without tensor cores a thread holds what it multiplies
        BN = 16
        BD = min(d, max(16, 2048 // BL)) if backward else BD
    # These have 64 to 100 KiB of shared memory, less than two stages of slices of the channels take.
    small = architecture.startswith(("gfx", "sm_86", "sm_89", "sm_12"))
    many = BL * BD >= 8192 or BL >= 128 or itemsize == 4
    num_warps = 8 if many and not architecture.startswith("gfx") else 4  # a warp of AMD's has twice the threads
    return Blocks(BN=BN, BD=BD, num_warps=num_warps, num_stages=1 if backward or (small and d > BD) else 2)


def grid(q: Tensor, l: int, blocks: Blocks) -> Grid:
    """About two programs per multiprocessor, of 4 l tokens at least: partial sums stay small beside the tokens."""
    b, h, n, d = q.shape
    slices = cdiv(d, blocks.BD)
    splits = max(1, 2 * multiprocessors(q.device) // (b * h * slices))
    splits = min(splits, cdiv(n, max(blocks.BN, 4 * l)))
    return Grid((b * h * splits, slices), splits)


def _exact_range(dtype: torch.dtype) -> tuple[float, float]:
    """Row and column sums between which exponentials with a common reference lose nothing, rounded to `dtype` too."""
    return (2.0**-8, 2.0**8) if dtype == torch.float16 else (2.0**-60, 2.0**60)


def _counts_bits(dtype: torch.dtype) -> bool:
    """Whether scores, and what is saved of the columns, are in powers of two, else in powers of e."""
    return dtype != torch.float32


def _precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies float32: as torch's products of matrices do."""
    return "tf32" if dtype == torch.float32 and products_in_tf32() else "ieee"


BE = 128  # elements that a program of the combining kernels owns


def _splits_at_a_time(splits: int) -> int:
    return min(power_of_two(splits), 32)


@on_device_of_tensors
def bidirectional_attention(
    q: Tensor, v: Tensor, map_q: Tensor, map_v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.reference` has it, but the logarithm of the column sums is to the base that the scores are powers of."""
    b, h, l, d = map_q.shape
    out, map_out = torch.empty_like(q), torch.empty_like(map_q)
    column_lse = map_q.new_empty((b, h, l), dtype=torch.float32)
    if q.numel() == 0:
        return out, map_out, column_lse
    blocks = choose_blocks(q, l, updates_map=True, backward=False)
    programs, splits = grid(q, l, blocks)
    references, sums = (map_q.new_empty((b * h, splits, l), dtype=torch.float32) for _ in range(2))
    parts = map_q.new_empty((b * h, splits, l, d), dtype=torch.float32)
    _launch_forward(programs, q, v, map_q, map_v, out, references, sums, parts, splits, scale, blocks, True)
    _combine_kernel[(b * h, cdiv(l * d, BE))](
        references, sums, parts, map_out, map_out.stride(), column_lse, l, h, splits,
        D=d, BS=_splits_at_a_time(splits), BE=BE, BITS=_counts_bits(q.dtype),
    )  # fmt: skip
    return out, map_out, column_lse


@on_device_of_tensors
def token_attention(q: Tensor, map_q: Tensor, map_v: Tensor, scale: float) -> Tensor:
    out = torch.empty_like(q)
    if q.numel() == 0:
        return out
    l = map_q.shape[2]
    blocks = choose_blocks(q, l, updates_map=False, backward=False)
    programs, splits = grid(q, l, blocks)
    _launch_forward(programs, q, q, map_q, map_v, out, q, q, q, splits, scale, blocks, False)
    return out


def _launch_forward(
    programs: tuple[int, int],
    q: Tensor,
    v: Tensor,
    map_q: Tensor,
    map_v: Tensor,
    out: Tensor,
    references: Tensor,
    sums: Tensor,
    parts: Tensor,
    splits: int,
    scale: float,
    blocks: Blocks,
    updates_map: bool,
) -> None:
    """Without a map to update, `v`, `references`, `sums` and `parts` are not touched."""
    _, h, n, d = q.shape
    l = map_q.shape[2]
    least, greatest = _exact_range(q.dtype)
    _forward_kernel[programs](
        q, q.stride(), v, v.stride(), map_q, map_q.stride(), map_v, map_v.stride(), out, out.stride(),
        references, sums, parts, n, l, h, splits, scale,
        D=d, BL=power_of_two(max(l, 16)), UPDATES_MAP=updates_map, LEAST=least, GREATEST=greatest,
        BITS=_counts_bits(q.dtype), PRECISION=_precision(q.dtype), **blocks._asdict(),
    )  # fmt: skip


@on_device_of_tensors
def bidirectional_attention_backward(
    grad_out: Tensor,
    grad_map_out: Tensor,
    q: Tensor,
    v: Tensor,
    map_q: Tensor,
    map_v: Tensor,
    map_out: Tensor,
    column_lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_q, grad_v = torch.empty_like(q), torch.empty_like(v)
    grad_map_q, grad_map_v = _launch_backward(
        grad_out, grad_map_out, q, v, map_q, map_v, map_out, column_lse, grad_q, grad_v, scale, True
    )
    return grad_q, grad_v, grad_map_q, grad_map_v


@on_device_of_tensors
def token_attention_backward(
    grad_out: Tensor, q: Tensor, map_q: Tensor, map_v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q = torch.empty_like(q)
    grad_map_q, grad_map_v = _launch_backward(
        grad_out, map_q, q, q, map_q, map_v, map_q, map_q, grad_q, grad_q, scale, False
    )
    return grad_q, grad_map_q, grad_map_v


def _launch_backward(
    grad_out: Tensor,
    grad_map_out: Tensor,
    q: Tensor,
    v: Tensor,
    map_q: Tensor,
    map_v: Tensor,
    map_out: Tensor,
    column_lse: Tensor,
    grad_q: Tensor,
    grad_v: Tensor,
    scale: float,
    updates_map: bool,
) -> tuple[Tensor, Tensor]:
    """Fills `grad_q` and `grad_v`; returns the gradients of map_q and map_v.

    Without a map that was updated, `grad_map_out`, `v`, `map_out`, `column_lse` and `grad_v` are not touched.
    """
    b, h, l, d = map_q.shape
    grad_map_q, grad_map_v = torch.empty_like(map_q), torch.empty_like(map_v)
    if q.numel() == 0:
        return grad_map_q, grad_map_v
    blocks = choose_blocks(q, l, updates_map=updates_map, backward=True)
    programs, splits = grid(q, l, blocks)
    parts = map_q.new_empty((2, b * h, splits, l, d), dtype=torch.float32)
    _backward_kernel[programs](
        grad_out, grad_out.stride(), grad_map_out, grad_map_out.stride(),
        q, q.stride(), v, v.stride(), map_q, map_q.stride(), map_v, map_v.stride(), map_out, map_out.stride(),
        column_lse, grad_q, grad_q.stride(), grad_v, grad_v.stride(), parts,
        q.shape[2], l, h, splits, scale, parts.stride(0),
        D=d, BL=power_of_two(max(l, 16)), UPDATES_MAP=updates_map, LEAST=2.0**-60, BITS=_counts_bits(q.dtype),
        PRECISION=_precision(q.dtype), **blocks._asdict(),
    )  # fmt: skip
    _sum_kernel[(b * h, cdiv(l * d, BE), 2)](
        parts, grad_map_q, grad_map_q.stride(), grad_map_v, grad_map_v.stride(), l, h, splits, parts.stride(0),
        D=d, BS=_splits_at_a_time(splits), BE=BE,
    )  # fmt: skip
    return grad_map_q, grad_map_v
