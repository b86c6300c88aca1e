"""Maps put together and taken apart: torch's numbers and gradients, and the layout of the maps throughout."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from utnetv2_fast.models import UTNetV2
from utnetv2_fast.nn.channels import concatenate, halves, merge_patches
from utnetv2_fast.nn.convolution import make_conv

FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


def random_map(channels: int, dimensions: int, batch: int, channels_last: bool) -> Tensor:
    x = torch.randn(batch, channels, *(6, 4, 8)[:dimensions], dtype=torch.float64)
    return (x.clone(memory_format=FORMATS[dimensions]) if channels_last else x).requires_grad_()


def compare(
    ours: Callable[..., Tensor], torchs: Callable[..., Tensor], maps: list[Tensor], channels_last: bool
) -> Tensor:
    """The result, equal to torch's, as the gradients are; in channels-last those are so, without gaps."""
    result, expected = ours(*maps), torchs(*maps)
    assert torch.equal(result, expected)
    cotangent = torch.randn_like(result)
    gradients = torch.autograd.grad(result, maps, cotangent)
    for got, want in zip(gradients, torch.autograd.grad(expected, maps, cotangent), strict=True):
        assert torch.equal(got, want)
        assert in_format(got, channels_last)
    return result


def in_format(x: Tensor, channels_last: bool) -> bool:
    return x.is_contiguous(memory_format=FORMATS[x.ndim - 2] if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_concatenation(dimensions: int, batch: int, channels_last: bool) -> None:
    maps = [random_map(channels, dimensions, batch, channels_last) for channels in (5, 3)]
    result = compare(concatenate, lambda x, y: torch.cat((x, y), 1), maps, channels_last)
    assert in_format(result, channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_halves(dimensions: int, batch: int, channels_last: bool) -> None:
    def exchanged(x: Tensor) -> Tensor:
        first, second = halves(x)
        return concatenate(second, first)

    compare(exchanged, lambda x: x.roll(3, 1), [random_map(6, dimensions, batch, channels_last)], channels_last)


def test_a_half_that_nobody_used_has_no_gradient() -> None:
    x = random_map(6, 2, 2, True)
    [gradient] = torch.autograd.grad(halves(x)[0].sum(), x)
    assert torch.equal(gradient, torch.cat((torch.ones_like(x[:, :3]), torch.zeros_like(x[:, 3:])), 1))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("scale", "slowest_first"), [((2, 2), (1, 0)), ((2, 1), (0, 1)), ((2, 2, 2), (0, 1, 2)), ((1, 2, 4), (2, 0, 1))]
)
def test_patches(scale: tuple[int, ...], slowest_first: tuple[int, ...], batch: int, channels_last: bool) -> None:
    def neighbours(x: Tensor) -> Tensor:
        merged = []
        for places in itertools.product(*(range(scale[axis]) for axis in slowest_first)):
            place = dict(zip(slowest_first, places, strict=True))
            merged.append(
                x[(slice(None), slice(None), *(slice(place[axis], None, size) for axis, size in enumerate(scale)))]
            )
        return torch.cat(merged, 1)

    maps = [random_map(3, len(scale), batch, channels_last)]
    result = compare(lambda x: merge_patches(x, scale, slowest_first), neighbours, maps, channels_last)
    assert in_format(result, channels_last)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_flat_kernel_in_bfloat16_convolves_planes(channels_last: bool, autocast: bool) -> None:
    conv = make_conv(3, 5, (1, 3, 5), bias=True)
    x = torch.randn(2, 3, 4, 6, 7)
    exact = torch.nn.functional.conv3d(x.double(), conv.weight.double(), conv.bias.double(), padding=(0, 1, 2))
    if channels_last:
        x = x.to(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = conv(x) if autocast else conv.bfloat16()(x.bfloat16())
    assert result.dtype == torch.bfloat16
    assert (result - exact).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_token_maps_are_channels_last_on_a_cpu(dimensions: int, batch: int) -> None:
    """From a single sample of a single channel on, whose strides do not tell."""
    model = UTNetV2.from_preset(f"tiny-{dimensions}d", in_channels=1, num_classes=3)
    stages = [model.stem, model.conv_down, *model.down, *model.up, *model.conv_up]
    strides: list[int] = []

    def note(module: torch.nn.Module, inputs: object, out: Tensor | tuple[Tensor, Tensor | None]) -> None:
        strides.append((out[0] if isinstance(out, tuple) else out).stride(1))

    for stage in stages:
        stage.register_forward_hook(note)
    model(torch.randn(batch, 1, *(32,) * dimensions))
    assert strides == [1] * len(stages)
