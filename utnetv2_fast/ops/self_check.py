"""Whether this machine computes what it should: operators, on examples and as a network will call them, in float64."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from utnetv2_fast.ops.bidirectional_attention import bidirectional_attention
from utnetv2_fast.ops.channel_moments import channel_moments, through_channel_moments
from utnetv2_fast.ops.depthwise_conv import depthwise_conv
from utnetv2_fast.ops.depthwise_separable_conv import depthwise_separable_conv, fuses
from utnetv2_fast.ops.dispatch import Impl, choose, distrust_triton, explain
from utnetv2_fast.ops.precision import convolutions_in_tf32, products_in_tf32
from utnetv2_fast.ops.scale_shift import scale_shift

Operator = Callable[..., Tensor | tuple[Tensor | None, ...]]

Shape = tuple[int, ...]
Layouts = tuple[tuple[Shape, Shape], ...]  # shape and strides of every tensor argument


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
    shapes = EXAMPLES[operator](4 if device.type == "cuda" else 1)
    return _arguments(tuple((shape, torch.empty(shape, device="meta").stride()) for shape in shapes), device, dtype)


def _examples(operator: Operator, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
    """`example` in two layouts."""
    arguments = example(operator, device, dtype)
    yield arguments
    yield tuple(map(_channels_last, arguments))


def _arguments(layouts: Layouts, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Random tensors of these shapes and strides. Parameters of channels, (B, C), are float32 beside narrower maps."""
    generator = torch.Generator().manual_seed(0)
    arguments = []
    for shape, stride in layouts:
        kept = [1 if step == 0 else size for size, step in zip(shape, stride, strict=True)]
        dtype_here = dtype if len(shape) > 2 else torch.promote_types(dtype, torch.float32)
        memory = torch.empty_strided(kept, stride, dtype=dtype_here, device=device)
        arguments.append(memory.copy_(torch.randn(kept, generator=generator)).expand(shape))
    return tuple(arguments)


def relative_error(operator: Operator, inputs: tuple[Tensor, ...], impl: Impl = "auto") -> float:
    """Largest error of any result or gradient against float64, as a share of its largest value; NaN counts.

    Of the operator itself and of its other uses.
    """
    exact_inputs = tuple(t.double() for t in inputs)
    errors = []
    for use in filter(None, (operator, _OTHER_USES.get(operator))):
        exact = _results_and_gradients(use, exact_inputs, "reference")
        results = _results_and_gradients(use, inputs, impl)
        errors += [(r.double() - e).abs().max() / e.abs().max() for r, e in zip(results, exact, strict=True)]
    return float(torch.stack(errors).max())  # not Python's max, which may pass over NaN


def _channels_last(x: Tensor) -> Tensor:
    """`x` with its second axis, channels or heads, innermost in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """What `relative_error` may be: some roundings of the dtype, or of TF32 where torch may multiply float32 in it."""
    if device.type == "cuda" and dtype == torch.float32 and (products_in_tf32() or convolutions_in_tf32()):
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


def check(
    operator: Operator,
    device: torch.device,
    dtype: torch.dtype,
    impl: Impl = "auto",
    layouts: Iterable[Layouts] = (),
) -> Finding:
    """Compare `operator` with its reference, on its example in two layouts and on arguments of further `layouts`.

    Raises torch.OutOfMemoryError where the device has no room for that.
    """
    further = (_arguments(of_use, device, dtype) for of_use in layouts)
    largest = 0.0
    for inputs in itertools.chain(_examples(operator, device, dtype), further):
        shapes = ", ".join(str(tuple(t.shape)) for t in inputs)
        try:
            error = relative_error(operator, inputs, impl)
        except torch.OutOfMemoryError:
            raise
        except Exception as raised:  # whatever a compiler or a driver makes of a kernel
            if any(word in str(raised).lower() for word in _FATAL):
                raise
            return Finding(None, f"{type(raised).__name__}: {raised}".splitlines()[0])
        if not error <= tolerance(dtype, device):
            return Finding(error, f"off by {error:.1e} of the largest value, for {shapes}")
        largest = max(largest, error)
    return Finding(largest, None)


# The tensor arguments of an operator under the names that they have in the schemas of torch's operators.
_ARGUMENTS: dict[Operator, tuple[str, ...]] = {
    bidirectional_attention: ("q", "v", "map_q", "map_v"),
    channel_moments: ("x",),
    depthwise_conv: ("x", "weight"),
    depthwise_separable_conv: ("x", "depthwise_weight", "pointwise_weight"),
    scale_shift: ("x", "scale", "shift"),
}


def layouts_in(
    network: nn.Module, shape: Shape, device: torch.device, dtype: torch.dtype | None
) -> dict[str, set[Layouts]]:
    """With what each operator, by name, is called when `network` gets (B, C, *spatial) under autocast to `dtype`.

    Nothing is computed.
    """
    names = {operator.__name__: named for operator, named in _ARGUMENTS.items()}
    found: dict[str, set[Layouts]] = {name: set() for name in names}

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func._schema.name.removeprefix("utnetv2_fast::").removeprefix("scaled_")
            name = name.replace("token_attention", "bidirectional_attention")
            if func.namespace == "utnetv2_fast" and name in names:
                given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
                given.setdefault("v", given.get("q"))  # which attention without a map to update does without
                tensors = (given[argument] for argument in names[name])
                found[name].add(tuple((tuple(t.shape), t.stride()) for t in tensors))
            return func(*args, **(kwargs or {}))

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        Record(),
        torch.no_grad(),
        torch.autocast(device.type, dtype, enabled=dtype is not None),
    ):
        network(torch.empty(shape, device=device))
    return found


@functools.cache
def distrust_wrong_kernels(
    device: torch.device, dtype: torch.dtype, layouts: frozenset[tuple[str, Layouts]] = frozenset()
) -> tuple[tuple[str, str], ...]:
    """Check all that Triton can run on `device` in `dtype`, and refuse it the operators that are wrong from now on.

    `layouts` are further ones to check, each with its operator's name. Returns name and problem of each operator that
    is wrong.
    """
    wrong = []
    for operator in EXAMPLES:
        name = operator.__name__
        inputs = example(operator, device, dtype)
        if "triton" in explain(operator, *inputs).refusals:
            continue
        further = sorted(of_use for used, of_use in layouts if used == name)
        try:
            problem = check(operator, device, dtype, "triton", further).problem
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            message = f"{name} could not be checked in full: the memory of {device} is too small for its results twice"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
            continue
        if problem is not None:
            distrust_triton(name, inputs[0].device, dtype)
            wrong.append((name, problem))
    return tuple(wrong)


_SAMPLES = 2  # of a run's batch that are checked: as many as a wrong step from sample to sample needs


def check_kernels(network: nn.Module, shape: Shape, device: torch.device, dtype: torch.dtype | None) -> None:
    """For the start of a run: on a GPU, use no Triton kernel that is wrong there in the run's dtype and shapes.

    It may meet this chip or this version of Triton for the first time. A warning names each operator that does without.
    `network` will get (B, C, *spatial) under autocast to `dtype` (None is float32).
    """
    if device.type != "cuda":
        return
    called = layouts_in(network, (min(shape[0], _SAMPLES), *shape[1:]), device, dtype)
    layouts = frozenset((name, of_use) for name, of_uses in called.items() for of_use in of_uses)
    dtype = dtype or torch.float32
    for operator, problem in distrust_wrong_kernels(device, dtype, layouts):
        message = f"{operator} runs without its Triton kernels, which are wrong on {device} in {dtype}: {problem}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
