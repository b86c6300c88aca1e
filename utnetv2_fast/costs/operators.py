"""What one layer that mixes positions costs as the map grows: measured, beside the complexities of the paper's Table 8.

All take x (B, d, H, W) and return as many channels. No position is encoded and nothing normalised, as the table has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utnetv2_fast.costs.measure import PeakMemory, in_a_process, shortest
from utnetv2_fast.nn.bidirectional_attention import BidirectionalAttention, merge_heads, split_heads
from utnetv2_fast.progress import Track, silent

KERNEL, WINDOW, MAP_SIDE, HEAD_CHANNELS = 3, 8, 3, 32
SIDES = (16, 24, 32, 48, 64, 96, 128)
_FITTED = 4  # the largest sizes, over which a power of n is fitted
# Memory of a process counts from this multiple of its smallest measured peak: below it is what any size takes.
_BEYOND_BASELINE = 1.5
_MOST_BYTES = 4 * 2**30


class SelfAttention(nn.Module):
    """Full attention between all positions; without `fused` the matrix (B, H, n, n) is held."""

    def __init__(self, channels: int, *, fused: bool = True) -> None:
        super().__init__()
        self.heads, self.fused = channels // HEAD_CHANNELS, fused
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.out = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(x).chunk(3, dim=1))  # (B, H, n, d) each
        if self.fused:
            attended = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        else:
            attended = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.out(merge_heads(attended, tuple(x.shape[2:])))


class WindowAttention(nn.Module):
    """Attention within windows of WINDOW x WINDOW positions; shifted by half of one if `shifted`, without wrapping."""

    def __init__(self, channels: int, *, shifted: bool) -> None:
        super().__init__()
        self.heads, self.shift = channels // HEAD_CHANNELS, WINDOW // 2 if shifted else 0
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.out = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).roll((-self.shift, -self.shift), (2, 3))
        q, k, v = self._windows(qkv).unflatten(-1, (3, self.heads, HEAD_CHANNELS)).permute(2, 0, 3, 1, 4)
        mask = self._mask(x).unsqueeze(1).repeat(len(x), 1, 1, 1) if self.shift else None
        attended = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)  # (B * windows, n_w, C)
        attended = self._whole(attended, x).roll((self.shift, self.shift), (2, 3))
        return self.out(attended)

    def _windows(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B * windows, WINDOW^2, C)"""
        parts = x.unflatten(3, (-1, WINDOW)).unflatten(2, (-1, WINDOW))  # (B, C, h, WINDOW, w, WINDOW)
        return parts.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)

    def _whole(self, windows: Tensor, x: Tensor) -> Tensor:
        """The inverse of `_windows`, with the sizes of x."""
        rows, columns = (n // WINDOW for n in x.shape[2:])
        parts = windows.view(len(x), rows, columns, WINDOW, WINDOW, -1)
        return parts.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _mask(self, x: Tensor) -> Tensor:
        """(windows, n_w, n_w): true where both positions lie on the same side of the edges that rolling joins."""
        sides = [torch.arange(n, device=x.device) >= n - self.shift for n in x.shape[2:]]
        region = sides[0].int()[:, None] * 2 + sides[1].int()  # (H, W)
        parts = self._windows(region[None, None]).squeeze(-1)
        return parts.unsqueeze(1) == parts.unsqueeze(2)


class _WithMap(nn.Module):
    """B-MHA with a semantic map that comes from elsewhere, as the network's does; the sum of what both maps become."""

    semantic_map: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = BidirectionalAttention(channels, channels, channels // HEAD_CHANNELS, (KERNEL, KERNEL))
        self.register_buffer("semantic_map", torch.randn(1, channels, MAP_SIDE**2))

    def forward(self, x: Tensor) -> Tensor:
        semantic_map = self.semantic_map.expand(len(x), -1, -1)
        out, map_out = self.attention(x, semantic_map)
        return out + map_out.mean()


class Operator(NamedTuple):
    """A layer, and what the paper says of it.

    complexity, formula        of n positions and d channels: operations, and how they are written
    parameters, parameters_as  of d channels
    """

    title: str
    make: Callable[[int], nn.Module]
    complexity: Callable[[int, int], int]
    formula: str
    parameters: Callable[[int], int]
    parameters_as: str


def _full(n: int, d: int) -> int:
    return 4 * n * d**2 + 2 * n**2 * d


OPERATORS: dict[str, Operator] = {
    "conv": Operator(
        f"convolution {KERNEL}x{KERNEL}",
        lambda d: nn.Conv2d(d, d, KERNEL, padding=KERNEL // 2, bias=False),
        lambda n, d: KERNEL**2 * n * d**2,
        "k²nd²",
        lambda d: KERNEL**2 * d**2,
        "k²d²",
    ),
    "mhsa": Operator(
        "MHSA, fused", SelfAttention, _full, "4nd² + 2n²d", lambda d: 4 * d**2, "4d²"
    ),
    "mhsa-naive": Operator(
        "MHSA, matrix held",
        partial(SelfAttention, fused=False),
        _full,
        "4nd² + 2n²d",
        lambda d: 4 * d**2,
        "4d²",
    ),
    "swin": Operator(
        "W-MHA + SW-MHA",
        lambda d: nn.Sequential(WindowAttention(d, shifted=False), WindowAttention(d, shifted=True)),
        lambda n, d: 8 * n * d**2 + 4 * WINDOW**2 * n * d,
        "8nd² + 4M²nd",
        lambda d: 8 * d**2,
        "8d²",
    ),
    "b-mha": Operator(
        "B-MHA",
        _WithMap,
        lambda n, d: 3 * n * d**2 + 3 * MAP_SIDE**2 * n * d,
        "3nd² + 3lnd",
        lambda d: 6 * d**2,
        "6d²",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Growth:
    """One operator over growing maps; the lists are as long as it was measured.

    positions   n
    seconds     of a step: forward and backward
    bytes       memory taken by it beside the layer; None where it is unknown
    operations  by the paper's formula
    """

    operator: str
    title: str
    formula: str
    parameters: int
    paper_parameters: int
    parameters_as: str
    positions: list[int]
    seconds: list[float]
    bytes: list[int | None]
    operations: list[int]

    @property
    def exponents(self) -> dict[str, float]:
        """The powers of n by which time, memory and the formula grow over the largest sizes."""
        return {
            name: fitted_exponent(self.positions, values)
            for name, values in (
                ("time", self.seconds),
                ("memory", _beyond_baseline(self.bytes)),
                ("paper", self.operations),
            )
        }


def _beyond_baseline(peaks: Sequence[int | None]) -> list[int | None]:
    """The peaks that show what a size takes; None for the others."""
    least = min((peak for peak in peaks if peak), default=0)
    return [peak if peak and peak > _BEYOND_BASELINE * least else None for peak in peaks]


def fitted_exponent(positions: Sequence[int], values: Sequence[float | None]) -> float:
    """The slope of log(values) over log(positions) at the largest few; not-a-number where there are fewer than two."""
    known = [(n, value) for n, value in zip(positions, values, strict=True) if value][-_FITTED:]
    if len(known) < 2:
        return float("nan")
    n, y = np.log(np.array(known, dtype=float)).T
    return float(np.polyfit(n, y, 1)[0])


def measure_operators(
    device: torch.device,
    *,
    channels: int = 64,
    batch_size: int = 1,
    sides: Sequence[int] = SIDES,
    longest: float = 3.0,
    track: Track = silent,
) -> list[Growth]:
    """Every operator on square maps of growing `sides`, multiples of WINDOW, until a step could take `longest` seconds.

    What could is judged as if time and memory grew by the square of n.
    """
    return [
        _measure(name, device, channels, batch_size, sides, longest) for name in track(list(OPERATORS), "Measuring")
    ]


def _measure(
    name: str, device: torch.device, channels: int, batch_size: int, sides: Sequence[int], longest: float
) -> Growth:
    operator = OPERATORS[name]
    arguments = (name, str(device), channels, batch_size, tuple(sides), longest)
    if device.type == "cpu":
        found = in_a_process("utnetv2_fast.costs.operators", "grow", *arguments, torch.get_num_threads())
    else:
        found = grow(*arguments)
    positions = [side * side for side in sides[: len(found)]]
    return Growth(
        operator=name,
        title=operator.title,
        formula=operator.formula,
        parameters=sum(p.numel() for p in operator.make(channels).parameters()),
        paper_parameters=operator.parameters(channels),
        parameters_as=operator.parameters_as,
        positions=positions,
        seconds=[took for took, _ in found],
        bytes=[size for _, size in found],
        operations=[operator.complexity(n, channels) for n in positions],
    )


def grow(
    name: str,
    device: str,
    channels: int,
    batch_size: int,
    sides: Sequence[int],
    longest: float,
    threads: int | None = None,
) -> list[tuple[float, int | None]]:
    """(seconds, bytes) of each side in ascending order, as many as are quick enough. On a CPU for a fresh process."""
    if threads is not None:
        torch.set_num_threads(threads)
    target = torch.device(device)
    layer = OPERATORS[name].make(channels).to(target)
    found: list[tuple[float, int | None]] = []
    _step(layer, torch.randn(batch_size, channels, WINDOW, WINDOW, device=target))  # loads what is loaded once
    peak = PeakMemory(target)
    for number, side in enumerate(sides):
        x = torch.randn(batch_size, channels, side, side, device=target)
        took = shortest(partial(_step, layer, x), target)
        found.append((took, peak.taken()))
        following = sides[number + 1 : number + 2]
        growth = (following[0] / side) ** 4 if following else 1.0
        if growth * took > longest or growth * (found[-1][1] or 0) > _MOST_BYTES:
            break
    return found


def _step(layer: nn.Module, x: Tensor) -> None:
    layer(x.requires_grad_()).sum().backward()
    x.grad = None
    layer.zero_grad()


def as_json(growths: Sequence[Growth]) -> list[dict[str, Any]]:
    return [asdict(growth) | {"exponents": growth.exponents} for growth in growths]
