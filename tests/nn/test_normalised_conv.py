"""Modules whose normalisations fuse with what follows: torch's numbers and running statistics, half of its memory."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from utnetv2_fast.models import UTNetV2
from utnetv2_fast.nn.convolution import DepthwiseConv, MBConv, Norm, NormActConv, ResidualBlock, make_conv
from utnetv2_fast.nn.stages import PatchMerging
from utnetv2_fast.ops import explain
from utnetv2_fast.ops.dispatch import Impl, implementation
from utnetv2_fast.ops.extension import load_extension

Make = Callable[[int, Norm, Impl], nn.Module]  # of 2 or 3 dimensions, for maps of 8 channels


def norm_act_conv(dimensions: int, norm: Norm, impl: Impl) -> nn.Module:
    return NormActConv(norm, 8, make_conv(8, 5, (3,) * dimensions), dimensions=dimensions, impl=impl)


def norm_depthwise(dimensions: int, norm: Norm, impl: Impl) -> nn.Module:
    conv = DepthwiseConv(8, (3,) * dimensions, impl=impl)
    return NormActConv(norm, 8, conv, dimensions=dimensions, act=False, impl=impl)


def residual_block(dimensions: int, norm: Norm, impl: Impl) -> nn.Module:
    return ResidualBlock(8, 8, (3,) * dimensions, norm, impl=impl)


def widening_block(dimensions: int, norm: Norm, impl: Impl) -> nn.Module:
    return ResidualBlock(8, 12, (1,) + (3,) * (dimensions - 1), norm, impl=impl)


def feed_forward(dimensions: int, norm: Norm, impl: Impl) -> nn.Module:
    return MBConv(8, (3,) * dimensions, 4, norm, impl=impl)


def patch_merging(dimensions: int, norm: Norm, impl: Impl) -> nn.Module:
    return PatchMerging(8, 12, (2,) * dimensions, (3,) * dimensions, norm, impl=impl)


MODULES = [norm_act_conv, norm_depthwise, residual_block, widening_block, feed_forward, patch_merging]


def pair(
    make: Make, dimensions: int, norm: Norm, dtype: torch.dtype, impl: Impl = "auto"
) -> tuple[nn.Module, nn.Module]:
    """The module as it is and as torch runs it, with the same random weights and running statistics."""
    fused, plain = make(dimensions, norm, impl), make(dimensions, norm, "reference")
    for name, tensor in fused.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + (0.5 if name.endswith("running_var") else -0.5))
    plain.load_state_dict(fused.state_dict())
    return fused.to(dtype), plain.to(dtype)


def run(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Result, gradients of the input and of the parameters."""
    x = x.detach().requires_grad_()
    result = module(x)
    cotangent = torch.sin(torch.arange(result.numel(), device=x.device)).view(result.shape).to(result.dtype)
    return [result, *torch.autograd.grad(result, [x, *module.parameters()], cotangent)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("make", MODULES)
def test_results_gradients_and_statistics_are_torchs(
    make: Make, dimensions: int, norm: Norm, training: bool, channels_last: bool
) -> None:
    fused, plain = pair(make, dimensions, norm, torch.float64)
    for _ in range(2):
        x = torch.randn(3, 8, *(6, 4, 8)[:dimensions], dtype=torch.float64)
        if channels_last:
            x = x.to(memory_format=torch.channels_last if dimensions == 2 else torch.channels_last_3d)
        results, expected = (run(module.train(training), x) for module in (fused, plain))
        for got, want in zip(results, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    for got, want in zip(fused.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_normalisation_within_the_convolution_gives_nearly_the_numbers_of_torch(
    dimensions: int, norm: Norm, frozen: bool
) -> None:
    """Where a kernel does both: float32, channels-last, enough channels."""

    def make(dimensions: int, norm: Norm, impl: Impl) -> nn.Module:
        return NormActConv(norm, 20, make_conv(20, 24, (3,) * dimensions), dimensions=dimensions, impl=impl)

    fused, plain = pair(make, dimensions, norm, torch.float32)
    exact = copy.deepcopy(plain).double()
    x = torch.randn(2, *(6, 4, 8)[:dimensions], 20).movedim(-1, 1)
    assert explain("dense_conv", x, fused.conv.weight).backend == "cpu" or load_extension() is None
    for module in (fused, plain, exact):
        module.conv.weight.requires_grad_(not frozen)
    results = []
    for module in (fused, exact):
        leaf = x.to(module.conv.weight.dtype).detach().requires_grad_()
        result = module(leaf)
        leaves = [leaf, *(p for p in module.parameters() if p.requires_grad)]
        results.append([result, *torch.autograd.grad(result.square().sum(), leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4 * float(want.detach().abs().max()))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("dimensions", "norm", "training"),
    [(2, "batch", True), (2, "batch", False), (3, "instance", True)],
)
@pytest.mark.parametrize("make", MODULES)
def test_triton_gives_nearly_the_numbers_of_torch(
    make: Make, dimensions: int, norm: Norm, training: bool, channels_last: bool, on_triton: torch.device
) -> None:
    fused, plain = (m.to(on_triton).train(training) for m in pair(make, dimensions, norm, torch.float32, "triton"))
    exact = copy.deepcopy(plain).double()
    x = torch.randn(2, 8, *(6, 4, 8)[:dimensions], device=on_triton)
    if channels_last:
        x = x.to(memory_format=torch.channels_last if dimensions == 2 else torch.channels_last_3d)
    for got, want, true in zip(run(fused, x), run(plain, x), run(exact, x.double()), strict=True):
        assert (got - true).norm() <= 2 * (want - true).norm() + 1e-5 * true.norm()
    for got, want in zip(fused.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-5)


def test_normalisations_fuse_on_triton(on_triton: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    triton, called = implementation("triton"), set()

    def recorded(name: str) -> Callable[..., object]:
        kernel = getattr(triton, name)

        def run(*arguments: object) -> object:
            called.add(name)
            return kernel(*arguments)

        return run

    kernels = {
        *("channel_moments", "channel_moments_backward", "scale_shift", "scale_shift_backward"),
        *("scaled_depthwise_conv", "scaled_depthwise_conv_backward_weight"),
    }
    for name in kernels:
        monkeypatch.setattr(triton, name, recorded(name))
    run(feed_forward(2, "batch", "triton").to(on_triton), torch.randn(2, 8, 6, 4, device=on_triton))
    assert called == kernels


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_running_statistics_follow_the_momentum(momentum: float | None) -> None:
    """None, a plain average, is what torch.optim.swa_utils.update_bn sets."""
    fused, plain = pair(residual_block, 2, "batch", torch.float64)
    for module in (fused, plain):
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = momentum
                norm.reset_running_stats()
    for _ in range(3):
        x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), plain(x))
    assert any(name.endswith("num_batches_tracked") for name, _ in fused.named_buffers())
    for got, want in zip(fused.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_autocast_gives_the_dtypes_and_nearly_the_numbers_of_torch(make: Make, norm: Norm) -> None:
    fused, plain = pair(make, 3, norm, torch.float32)
    exact = copy.deepcopy(plain).double()
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 8, 6, 4, 8).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            results, eager = run(fused, x), run(plain, x)
        for got, want, true in zip(results, eager, run(exact, x.double()), strict=True):
            assert got.dtype == want.dtype
            error, eager_error = (got - true).norm(), (want - true).norm()
            assert error <= 2 * eager_error + 0.01 * true.norm()


@pytest.mark.parametrize(("norm", "shape"), [("batch", (1, 8, 1, 1)), ("instance", (2, 8, 1, 1))])
def test_a_single_value_has_no_variance(norm: Norm, shape: tuple[int, ...]) -> None:
    for module in pair(norm_act_conv, 2, norm, torch.float32):
        with pytest.raises(ValueError, match=r"^Expected more than 1 .* when training, got input size"):
            module(torch.zeros(shape))


@pytest.mark.parametrize("make", MODULES)
def test_frozen_parameters_get_no_gradient_and_change_none(make: Make) -> None:
    module, _ = pair(make, 2, "batch", torch.float64)
    x = torch.randn(2, 8, 6, 4, dtype=torch.float64)
    expected = dict(zip([name for name, _ in module.named_parameters()], run(module, x)[2:], strict=True))
    for frozen in expected:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name != frozen)
            parameter.grad = None
        result = module(x)
        result.backward(torch.sin(torch.arange(result.numel())).view(result.shape).to(result.dtype))
        for name, parameter in module.named_parameters():
            if name == frozen:
                assert parameter.grad is None
            else:
                torch.testing.assert_close(parameter.grad, expected[name])


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Memory that a forward pass keeps for backward, without the parameters."""
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no two of them get one address

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        storage = t.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    return sum(size for address, size in sizes.items() if address not in parameters)


@pytest.mark.skipif("cpu" in explain("scale_shift", torch.zeros(1, 1, 1)).refusals, reason="needs the C++ extension")
@pytest.mark.parametrize("dimensions", [2, 3])
def test_half_of_the_memory_is_saved_for_backward(dimensions: int) -> None:
    x = torch.randn(1, 1, *(32,) * dimensions)
    fused, plain = (
        saved_bytes(UTNetV2.from_preset(f"tiny-{dimensions}d", in_channels=1, num_classes=3, impl=impl), x)
        for impl in ("auto", "reference")
    )
    assert fused < 0.56 * plain


def test_compiles_whole() -> None:
    check_compiled("auto", torch.float64, torch.device("cpu"))


def test_compiles_whole_with_triton(on_triton: torch.device) -> None:
    check_compiled("triton", torch.float32, on_triton)


def check_compiled(impl: Impl, dtype: torch.dtype, device: torch.device) -> None:
    torch._dynamo.reset()
    for norm in ("batch", "instance"):
        module, _ = pair(feed_forward, 2, norm, dtype, impl)
        module.to(device)
        other = copy.deepcopy(module)
        x = torch.randn(2, 8, 6, 4, dtype=dtype, device=device)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for got, want in zip(run(compiled, x), run(other, x), strict=True):
            torch.testing.assert_close(got, want)
        for got, want in zip(module.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(got, want)
