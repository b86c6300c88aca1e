"""Each operator on a small example, against its reference in float64: whether this machine computes what it should."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from utnetv2_fast.ops.bidirectional_attention import bidirectional_attention
from utnetv2_fast.ops.channel_moments import channel_moments, through_channel_moments
from utnetv2_fast.ops.depthwise_conv import depthwise_conv
from utnetv2_fast.ops.depthwise_separable_conv import depthwise_separable_conv, fuses
from utnetv2_fast.ops.dispatch import Impl, choose, distrust_triton, explain
from utnetv2_fast.ops.scale_shift import scale_shift

Operator = Callable[..., Tensor | tuple[Tensor | None, ...]]

Shape = tuple[int, ...]


def _map(scale: int) -> Shape:
    return (1, 16, 6 * scale, 10 * scale, 12 * scale)


def _heads(tokens: int) -> Shape:
    return (1, 4, tokens, 32)


# Shapes of the tensor arguments: ACDC's in small, every spatial axis longer by a factor.
EXAMPLES: dict[Operator, Callable[[int], tuple[Shape, ...]]] = {
    bidirectional_attention: lambda scale: (*[_heads(260 * scale**3)] * 2, *[_heads(27)] * 2),
    channel_moments: lambda scale: (_map(scale),),
    depthwise_conv: lambda scale: (_map(scale), (16, 1, 3, 3, 3)),
    depthwise_separable_conv: lambda scale: (_map(scale), (16, 1, 1, 3, 3), (24, 16, 1, 1, 1)),
    scale_shift: lambda scale: (_map(scale), (1, 16), (1, 16)),
}


def _scale_and_shift(x: Tensor) -> tuple[Tensor, Tensor]:
    """Parameters (B, C) for the channels of x."""
    parameter = torch.linspace(-1, 1, x.shape[0] * x.shape[1]).view(x.shape[:2])
    parameter = parameter.to(x.device, torch.promote_types(x.dtype, torch.float32))
    return 2 * parameter, parameter


@torch.no_grad()
def _scaled_depthwise_conv(x: Tensor, weight: Tensor, *, impl: Impl) -> tuple[Tensor, Tensor]:
    """What normalising modules call in place of `depthwise_conv`: result and gradient of the weight."""
    ops, backend = torch.ops.utnetv2_fast, choose("depthwise_conv", impl, (x, weight))
    arguments = (x, *_scale_and_shift(x), True, weight, backend)
    return ops.scaled_depthwise_conv(*arguments), ops.scaled_depthwise_conv_backward_weight(x, *arguments)


@torch.no_grad()
def _scaled_depthwise_separable_conv(
    x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, *, impl: Impl
) -> Tensor:
    """The same in place of `depthwise_separable_conv`, by one kernel where Triton makes one of both convolutions."""
    (scale, shift), weights, ops = _scale_and_shift(x), (depthwise_weight, pointwise_weight), torch.ops.utnetv2_fast
    if choose("depthwise_separable_conv", impl, (x, *weights)) == "triton" and fuses(x, *weights):
        return ops.scaled_depthwise_separable_conv(x, scale, shift, True, *weights)
    over = (..., None, None, None)
    y = (x * scale[over] + shift[over]).relu().to(x.dtype)
    return depthwise_separable_conv(y, *weights, impl=impl)


# Further uses of an operator that run kernels of their own, on the same arguments.
_OTHER_USES: dict[Operator, Operator] = {
    bidirectional_attention: functools.partial(bidirectional_attention, need_map=False),
    channel_moments: through_channel_moments,
    depthwise_conv: _scaled_depthwise_conv,
    depthwise_separable_conv: _scaled_depthwise_separable_conv,
    scale_shift: functools.partial(scale_shift, relu=True),
}


def example(operator: Operator, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """The same random arguments for `operator` at every call: on a GPU enough to give every multiprocessor some."""
    generator = torch.Generator().manual_seed(0)
    shapes = EXAMPLES[operator](4 if device.type == "cuda" else 1)
    return tuple(
        # Parameters of channels, (B, C), are float32 beside narrower maps.
        torch.randn(shape, generator=generator).to(
            device, dtype if len(shape) > 2 else torch.promote_types(dtype, torch.float32)
        )
        for shape in shapes
    )


def relative_error(operator: Operator, device: torch.device, dtype: torch.dtype, impl: Impl = "auto") -> float:
    """Largest error of any result or gradient against float64 on the CPU, as a share of its largest value; NaN counts.

    Of the operator itself and of its other uses, in two layouts.
    """
    inputs = example(operator, device, dtype)
    exact_inputs = tuple(t.cpu().double() for t in inputs)
    errors = []
    for use in filter(None, (operator, _OTHER_USES.get(operator))):
        exact = _results_and_gradients(use, exact_inputs, "reference")
        for arguments in (inputs, tuple(map(_channels_last, inputs))):
            results = _results_and_gradients(use, arguments, impl)
            errors += [(r.cpu().double() - e).abs().max() / e.abs().max() for r, e in zip(results, exact, strict=True)]
    return float(torch.stack(errors).max())  # not Python's max, which may pass over NaN


def _channels_last(x: Tensor) -> Tensor:
    """`x` with its second axis, channels or heads, innermost in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """What `relative_error` may be: some roundings of the dtype, or of TF32 where torch may multiply float32 in it."""
    multiplies_tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    if device.type == "cuda" and dtype == torch.float32 and multiplies_tf32:
        return 16 * 2**-10
    return 16 * torch.finfo(dtype).eps


def _results_and_gradients(operator: Operator, inputs: tuple[Tensor, ...], impl: Impl) -> list[Tensor]:
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    returned = operator(*inputs, impl=impl)
    results = [r for r in (returned if isinstance(returned, tuple) else (returned,)) if r is not None]
    differentiable = [r for r in results if r.requires_grad]
    gradients: tuple[Tensor | None, ...] = ()
    if differentiable:
        ones = [torch.ones_like(r) for r in differentiable]
        gradients = torch.autograd.grad(differentiable, inputs, ones, allow_unused=True)
    return [*(r.detach() for r in results), *(g for g in gradients if g is not None)]


# What CUDA says when a kernel has spoilt the GPU for this process: nothing can run on it after that.
_FATAL = ("illegal memory access", "misaligned address", "unspecified launch failure")


@dataclass(frozen=True)
class Finding:
    """What came of an operator's check: its error (None if it raised), and what is wrong (None if nothing is)."""

    error: float | None
    problem: str | None


def check(operator: Operator, device: torch.device, dtype: torch.dtype, impl: Impl = "auto") -> Finding:
    """Compare `operator` with its reference."""
    try:
        error = relative_error(operator, device, dtype, impl)
    except Exception as raised:  # whatever a compiler or a driver makes of a kernel
        if any(word in str(raised).lower() for word in _FATAL):
            raise
        return Finding(None, f"{type(raised).__name__}: {raised}".splitlines()[0])
    if error <= tolerance(dtype, device):
        return Finding(error, None)
    return Finding(error, f"off by {error:.1e} of the largest value")


@functools.cache
def distrust_wrong_kernels(device: torch.device, dtype: torch.dtype) -> tuple[tuple[str, str], ...]:
    """Check all that Triton can run on `device` in `dtype`, and refuse it the operators that are wrong from now on.

    Returns the name and the problem of each of them.
    """
    wrong = []
    for operator in EXAMPLES:
        inputs = example(operator, device, dtype)
        explanation = explain(operator, *inputs)
        if "triton" in explanation.refusals:
            continue
        problem = check(operator, device, dtype, "triton").problem
        if problem is not None:
            distrust_triton(explanation.operator, inputs[0].device, dtype)
            wrong.append((explanation.operator, problem))
    return tuple(wrong)


def check_kernels(device: torch.device, dtype: torch.dtype | None) -> None:
    """For the start of a run in `dtype` (None is float32): on a GPU, use no Triton kernel that is wrong there.

    It may meet this chip or this version of Triton for the first time. A warning names each operator that does without.
    """
    if device.type != "cuda":
        return
    dtype = dtype or torch.float32
    for operator, problem in distrust_wrong_kernels(device, dtype):
        message = f"{operator} runs without its Triton kernels, which are wrong on {device} in {dtype}: {problem}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
