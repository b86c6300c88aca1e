"""Window attention: cutting and joining, who sees whom, the order of the bias table, merging and expanding."""

from __future__ import annotations

import math

import pytest
import torch

from utnetv2_fast.models.rivals.window_attention import (
    WINDOW,
    Expanding,
    PlanarMerging,
    WindowAttention,
    relative_positions,
    windows_for,
)

CPU = torch.device("cpu")
SIZES = [(14, 14), (8, 15), (3, 9), (4, 8, 9), (7, 7, 7)]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_joining_undoes_cutting(size: tuple[int, ...], shifted: bool) -> None:
    windows = windows_for(size, shifted=shifted)
    x = torch.randn(2, *size, 3)
    cut = windows.cut(x)
    assert cut.shape == (2 * math.prod(windows.grid), math.prod(windows.window), 3)
    torch.testing.assert_close(windows.join(cut), x, rtol=0, atol=0)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size", [(14, 14), (9, 8), (5, 8, 9)])
def test_a_token_sees_those_of_its_window_that_are_its_neighbours(size: tuple[int, ...], shifted: bool) -> None:
    """Neither padding nor what the shift has wrapped: by the places of the tokens themselves."""
    windows = windows_for(size, shifted=shifted)
    places = torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij"), dim=-1)  # (*spatial, axes)
    cut = windows.cut(places[None].double() + 1)  # padding has the place 0
    separated = windows.separated(CPU)
    if separated is None:
        separated = torch.zeros(len(cut), cut.shape[1], cut.shape[1], dtype=torch.bool)
    shift, length = torch.tensor(windows.shift), torch.tensor(windows.window)
    block = torch.div(cut - 1 - shift, length, rounding_mode="floor")  # of the shifted lattice, without wrapping
    real = (cut > 0).all(-1)
    same = (block[:, :, None] == block[:, None, :]).all(-1)
    both = real[:, :, None] & real[:, None, :]
    assert torch.equal(~separated & both, same & both)
    assert not (~separated & (real[:, :, None] != real[:, None, :])).any()


def test_the_bias_table_is_read_in_the_order_of_the_published_weights() -> None:
    """As the Swin of the authors numbers the pairs: row offset times 13 plus column offset, each from -6."""
    index = relative_positions((WINDOW, WINDOW), CPU)
    for query, key in ((0, 0), (0, 48), (48, 0), (10, 33)):
        rows, columns = query // 7 - key // 7, query % 7 - key % 7
        assert index[query, key] == (rows + 6) * 13 + columns + 6
    assert relative_positions((2, 3, 4), CPU).shape == (24, 24)
    assert relative_positions((1, 1, 1), CPU) == (13**3 - 1) / 2


@pytest.mark.parametrize("size", [(14, 14), (6, 9)])
def test_attention_is_that_of_each_window(size: tuple[int, int]) -> None:
    """Against softmax(q k / sqrt d + bias) v of every token over the tokens that it sees, one by one."""
    torch.manual_seed(0)
    heads, channels = 2, 6
    layer = WindowAttention(channels, heads, 2, shifted=False).double()
    x = torch.randn(1, *size, channels, dtype=torch.float64)
    out, _ = layer(x)
    window = [min(n, WINDOW) for n in size]
    q, k, v = layer.qkv(x[0]).unflatten(-1, (3, heads, -1)).unbind(2)  # (H, W, heads, d)
    expected = torch.empty_like(x[0])
    for i in range(size[0]):
        for j in range(size[1]):
            top, left = i // window[0] * window[0], j // window[1] * window[1]
            seen = [
                (a, b)
                for a in range(top, min(top + window[0], size[0]))
                for b in range(left, min(left + window[1], size[1]))
            ]
            found = []
            for h in range(heads):
                scores = torch.stack(
                    [
                        q[i, j, h] @ k[a, b, h] / math.sqrt(channels / heads)
                        + layer.relative_position_bias_table[(i - a + 6) * 13 + j - b + 6, h]
                        for a, b in seen
                    ]
                )
                found.append(scores.softmax(0) @ torch.stack([v[a, b, h] for a, b in seen]))
            expected[i, j] = layer.proj(torch.cat(found))
    torch.testing.assert_close(out[0], expected, rtol=1e-9, atol=1e-9)


def test_merging_reads_neighbours_in_the_published_order() -> None:
    """Row offset fastest, and an axis before the last two stays."""
    layer = PlanarMerging(1)
    layer.norm = torch.nn.Identity()
    layer.reduction = torch.nn.Identity()
    x = torch.arange(8.0).view(1, 2, 2, 2, 1)
    assert layer(x).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_expanding_puts_channels_beside_each_other() -> None:
    layer = Expanding(4, 1, (2, 2))
    layer.norm = torch.nn.Identity()
    layer.expand = torch.nn.Identity()
    x = torch.arange(8.0).view(1, 1, 2, 4)
    assert layer(x)[0, ..., 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
