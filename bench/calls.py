"""Calls of the Triton kernels at the networks' shapes, on any device: to compile them, to tune them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.peers import in_format
from bench.shapes import ATTENTION, BATCHES, DEPTHWISE, Attention, Depthwise
from utnetv2_fast.ops import triton as kernels

Run = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Call:
    """`prepare` makes the tensors and returns what computes the results. The main ones are the networks' largest."""

    name: str
    main: bool
    prepare: Callable[[], Run]


def calls(device: torch.device) -> Iterator[Call]:
    """All shapes in bfloat16 and channels-last, as networks run on a GPU; the largest of each in the other ways too.

    And what compiles to other code than any of them.
    """
    for dtype in (torch.bfloat16, torch.float32):
        for channels_last in (True, False):
            usual = dtype == torch.bfloat16 and channels_last
            how = f"{str(dtype).removeprefix('torch.')} {'channels-last' if channels_last else 'channels-first'}"
            for network, levels in ATTENTION.items():
                for index, level in enumerate(levels if usual else levels[:1]):
                    prepare = _attention(network, level, dtype, channels_last, device)
                    main = usual and index == 0 and network != "acdc-3d-medformer"
                    yield Call(f"bidirectional_attention {network} n{level.n} {how}", main, prepare)
            for network, cases in DEPTHWISE.items():
                for index, case in enumerate(cases if usual else cases[:1]):
                    size = "x".join(map(str, (case.C, *case.spatial)))
                    name = f"{network} {size} {'x'.join(map(str, case.kernel))} {how}"
                    main = usual and index == 0 and network in ("acdc-2d", "acdc-3d")
                    inputs = (network, case, dtype, channels_last, device)
                    yield Call(f"depthwise_conv {name}", main, _depthwise(*inputs))
                    yield Call(f"depthwise_separable_conv {name}", main, _separable(*inputs))
                    yield Call(f"normalisation {name}", main, _normalisation(*inputs))
    yield from _special_calls(device)


def _special_calls(device: torch.device) -> Iterator[Call]:
    network = "acdc-3d"
    level, case = ATTENTION[network][0], DEPTHWISE[network][0]
    alone = Attention(H=1, n=1, l=1, d=level.d)
    for dtype in (torch.bfloat16, torch.float32):
        how = str(dtype).removeprefix("torch.")
        yield Call(f"token_attention n{level.n} {how}", False, _token_attention(network, level, dtype, device))
        yield Call(f"bidirectional_attention n1 l1 {how}", False, _attention(network, alone, dtype, True, device))
        yield Call(f"depthwise_conv with a bias {how}", False, _depthwise_with_bias(case, dtype, device))
        for axes in (2, 3):
            yield Call(f"normalisation over {axes} axes {how}", False, _normalisation_of_a_part(axes, dtype, device))
    inputs = (torch.float16, True, device)
    yield Call(f"bidirectional_attention n{level.n} float16", False, _attention(network, level, *inputs))
    yield Call("depthwise_conv float16", False, _depthwise(network, case, *inputs))


def _attention(
    network: str, level: Attention, dtype: torch.dtype, channels_last: bool, device: torch.device
) -> Callable[[], Run]:
    (h, n, l, d), b = level, BATCHES[network]

    def halves(rows: int) -> tuple[Tensor, ...]:
        """q and v, or those of the map, as the network has them: halves of one tensor."""
        if channels_last:
            joined = torch.randn(b, rows, 2 * h * d, dtype=dtype, device=device)
            return tuple(t.unflatten(2, (h, d)).transpose(1, 2) for t in joined.chunk(2, 2))
        joined = torch.randn(b, 2 * h * d, rows, dtype=dtype, device=device)
        return tuple(t.unflatten(1, (h, d)).mT for t in joined.chunk(2, 1))

    def prepare() -> Run:
        (q, v), (map_q, map_v), scale = halves(n), halves(l), d**-0.5

        def run() -> tuple[Tensor, ...]:
            out, map_out, lse = kernels.bidirectional_attention(q, v, map_q, map_v, scale)
            gradients = kernels.bidirectional_attention_backward(out, map_out, q, v, map_q, map_v, map_out, lse, scale)
            return out, map_out, *gradients

        return run

    return prepare


def _token_attention(network: str, level: Attention, dtype: torch.dtype, device: torch.device) -> Callable[[], Run]:
    (h, n, l, d), b = level, BATCHES[network]

    def prepare() -> Run:
        q, map_q, map_v = (torch.randn(b, rows, h, d, dtype=dtype, device=device).transpose(1, 2) for rows in (n, l, l))

        def run() -> tuple[Tensor, ...]:
            out = kernels.token_attention(q, map_q, map_v, d**-0.5)
            return out, *kernels.token_attention_backward(out, q, map_q, map_v, d**-0.5)

        return run

    return prepare


def _map(
    network: str, channels: int, case: Depthwise, dtype: torch.dtype, channels_last: bool, device: torch.device
) -> Tensor:
    return in_format(torch.randn(BATCHES[network], channels, *case.spatial, dtype=dtype, device=device), channels_last)


def _depthwise(
    network: str, case: Depthwise, dtype: torch.dtype, channels_last: bool, device: torch.device
) -> Callable[[], Run]:
    def prepare() -> Run:
        x = _map(network, case.C, case, dtype, channels_last, device)
        weight = torch.randn(case.C, 1, *case.kernel, dtype=dtype, device=device)
        scale, shift = torch.randn(2, *x.shape[:2], device=device)
        return lambda: (
            kernels.depthwise_conv(x, weight, None),
            kernels.depthwise_conv_backward_weight(x, x, weight),
            kernels.scaled_depthwise_conv(x, scale, shift, True, weight),
            kernels.scaled_depthwise_conv_backward_weight(x, x, scale, shift, True, weight),
        )

    return prepare


def _depthwise_with_bias(case: Depthwise, dtype: torch.dtype, device: torch.device) -> Callable[[], Run]:
    def prepare() -> Run:
        x = torch.randn(1, case.C, *case.spatial, dtype=dtype, device=device)
        weight, bias = torch.randn(case.C, 28, dtype=dtype, device=device).split((27, 1), 1)
        weight = weight.reshape(case.C, 1, 3, 3, 3)
        return lambda: (kernels.depthwise_conv(x, weight, bias.flatten()),)

    return prepare


def _separable(
    network: str, case: Depthwise, dtype: torch.dtype, channels_last: bool, device: torch.device
) -> Callable[[], Run]:
    def prepare() -> Run:
        x = _map(network, case.C, case, dtype, channels_last, device)
        weight = torch.randn(case.C, 1, *case.kernel, dtype=dtype, device=device)
        pointwise = torch.randn(case.C_out, case.C, *[1] * len(case.kernel), dtype=dtype, device=device)
        return lambda: (kernels.depthwise_separable_conv(x, weight, pointwise),)

    return prepare


def _normalisation(
    network: str, case: Depthwise, dtype: torch.dtype, channels_last: bool, device: torch.device
) -> Callable[[], Run]:
    return lambda: _normalising(_map(network, case.C, case, dtype, channels_last, device))


def _normalisation_of_a_part(axes: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Run]:
    """Of a map whose spatial axes are not one stretch of memory, but as many as `axes`."""

    def prepare() -> Run:
        x = torch.randn(1, 48, 16, 96, 96, dtype=dtype, device=device)
        return _normalising(x[..., ::2] if axes == 2 else x[..., ::2, ::2])

    return prepare


def _normalising(x: Tensor) -> Run:
    def run() -> tuple[Tensor, ...]:
        mean, variance = kernels.channel_moments(x)
        return (
            mean,
            variance,
            kernels.channel_moments_backward(mean, variance, x, mean, x),
            kernels.scale_shift(x, mean, variance, True),
            *kernels.scale_shift_backward(x, x, mean, variance, True),
        )

    return run
