"""Efficient attention against its definition, no attention, and the bias of relative positions."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from utnetv2_fast import ops
from utnetv2_fast.nn.bidirectional_attention import RelativePositionBias, biased_bidirectional_attention
from utnetv2_fast.nn.efficient_attention import EfficientAttention, IdentityAttention


def test_efficient_attention_is_attention_to_means_of_areas() -> None:
    attention = EfficientAttention(4, 8, 2, (3, 3), (2, 2), convolve=False).double()
    x = torch.randn(2, 4, 6, 8, dtype=torch.float64)

    def tokens(x: torch.Tensor) -> torch.Tensor:  # (B, C, *spatial) -> (B, H, n, d)
        return x.flatten(2).unflatten(1, (2, 4)).transpose(2, 3)

    kv = attention.kv(x).unflatten(2, (2, 3)).unflatten(4, (2, 4)).mean((3, 5))
    k, v = kv.chunk(2, dim=1)
    attended = F.scaled_dot_product_attention(tokens(attention.q(x)), tokens(k), tokens(v))
    expected = attention.out(attended.transpose(2, 3).reshape(2, 8, 6, 8))
    torch.testing.assert_close(attention(x), expected)


def test_efficient_attention_takes_maps_smaller_than_its_own() -> None:
    attention = EfficientAttention(4, 4, 1, (1, 3, 3), (4, 4, 4), convolve=True)
    assert attention(torch.randn(1, 4, 1, 2, 3)).shape == (1, 4, 1, 2, 3)


def test_identity_mixes_no_further_than_its_kernels() -> None:
    attention = IdentityAttention(2, 2, (3, 3))
    x = torch.randn(1, 2, 9, 9)
    changed = x.clone()
    changed[..., 0, 0] += 1
    difference = (attention(changed) - attention(x)).abs().sum(1)[0]
    assert difference[:3, :3].max() > 0
    assert difference[3:].max() == difference[:, 3:].max() == 0


def test_bias_of_zero_changes_nothing() -> None:
    q, v = torch.randn(2, 1, 2, 12, 4, dtype=torch.float64)
    map_q, map_v = torch.randn(2, 1, 2, 6, 4, dtype=torch.float64)
    expected = ops.bidirectional_attention(q, v, map_q, map_v)
    actual = biased_bidirectional_attention(q, v, map_q, map_v, torch.zeros(2, 12, 6, dtype=torch.float64))
    torch.testing.assert_close(actual, expected)


def test_bias_follows_the_offset_between_cells() -> None:
    bias = RelativePositionBias(2, (2, 3))
    of_tokens = bias((4, 3)).unflatten(1, (4, 3)).unflatten(3, (2, 3))  # (H, row, column, map row, map column)
    for row in range(4):
        for column in range(3):
            for i in range(2):
                for j in range(3):
                    expected = bias.table[:, row // 2 - i + 1, column - j + 2]
                    assert torch.equal(of_tokens[:, row, column, i, j], expected)
    assert bias((1, 2)).shape == (2, 2, 6)
