"""What the Transformers among the rivals share: the perceptron of a block, stochastic depth, and a third colour."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

COLOURS = 3  # of the images on which their published weights were trained


class Perceptron(nn.Module):
    """Two layers with a GELU between them, on the last axis: (..., C) -> (..., C)."""

    def __init__(self, channels: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


class StochasticDepth(nn.Module):
    """In training, leaves out a residual branch (B, ...) of a sample with this probability."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return branch
        kept = torch.rand(len(branch), *(1,) * (branch.ndim - 1), device=branch.device) >= self.probability
        return branch * kept / (1 - self.probability)


def embedded_channels(in_channels: int) -> int:
    """How many channels the first convolution takes: a single one is repeated, as the authors do."""
    return COLOURS if in_channels == 1 else in_channels


def repeat_single_channel(x: Tensor) -> Tensor:
    """(B, 1, *spatial) -> (B, 3, *spatial); more channels stay as they are."""
    return x.expand(-1, COLOURS, *x.shape[2:]) if x.shape[1] == 1 else x
