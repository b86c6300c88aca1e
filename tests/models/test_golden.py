"""The authors' weights give the authors' numbers: logits, auxiliary logits and every gradient."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from utnetv2_fast.models import UTNetV2, UTNetV2Config
from utnetv2_fast.models.medformer_weights import convert_medformer_state_dict
from utnetv2_fast.ops import explain
from utnetv2_fast.ops.dispatch import interprets_triton
from utnetv2_fast.ops.self_check import EXAMPLES, example

GOLDEN = Path(os.environ.get("UTNETV2_FAST_GOLDEN", Path(__file__).parents[3] / "shared" / "golden"))
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the authors' golden vectors are not beside the checkout")

CPU = torch.device("cpu")
COMMON = {"blocks": (2, 2, 2), "fusion_channels": 64, "fusion_heads": 4}
CONFIGS = {
    2: UTNetV2Config(
        **COMMON,
        dimensions=2,
        in_channels=2,
        num_classes=4,
        channels=(8, 16, 32, 64, 128),
        scales=((2, 2),) * 4,
        kernel_sizes=((3, 3),) * 5,
        heads=(4, 8, 16),
        map_size=(3, 3),
        expansion=2,
        norm="batch",
        reduce_skip=True,
    ),
    3: UTNetV2Config(
        **COMMON,
        dimensions=3,
        in_channels=1,
        num_classes=3,
        channels=(8, 16, 32, 64, 80),
        scales=((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)),
        kernel_sizes=((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
        heads=(4, 4, 4),
        map_size=(1, 3, 3),
        expansion=4,
        norm="instance",
        reduce_skip=False,
    ),
}


@pytest.fixture(params=["reference", "cpu", "triton"])
def impl(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Every backend that runs all operators of the network on `device`."""
    for operator in EXAMPLES:
        refusals = explain(operator, *example(operator, device)).refusals
        if request.param in refusals:
            pytest.skip(f"{operator.__name__}: {refusals[request.param]}")
    if request.param == "triton" and interprets_triton():
        pytest.skip("Triton's interpreter takes minutes")
    return str(request.param)


def load(
    dimensions: int, dtype: torch.dtype, impl: str, device: torch.device = CPU
) -> tuple[UTNetV2, dict[str, np.ndarray], dict[str, torch.Tensor]]:
    vectors = dict(np.load(GOLDEN / f"medformer_{dimensions}d.npz"))
    state = {k.removeprefix("state/"): torch.from_numpy(v) for k, v in vectors.items() if k.startswith("state/")}
    model = UTNetV2(CONFIGS[dimensions].model_copy(update={"impl": impl}))
    model.load_medformer_state_dict(state)
    return model.to(device, dtype).eval(), vectors, state


def relative_error(actual: torch.Tensor, expected: np.ndarray) -> float:
    reference = torch.from_numpy(expected)
    return ((actual.cpu().double() - reference).norm() / reference.norm()).item()


def with_auxiliary(model: UTNetV2, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both outputs as the authors' network gives them in eval mode too: only the top module is set to training."""
    model.training = True
    outputs = model(x)
    assert isinstance(outputs, tuple)
    return outputs


TOLERANCES = [(torch.float64, 1e-9), (torch.float32, 1e-4)]


def gradients(model: UTNetV2, vectors: dict[str, np.ndarray], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Logits, auxiliary logits and the input's gradient of the scalar in the vectors; parameters keep theirs."""
    device = next(model.parameters()).device
    x = torch.from_numpy(vectors["input"]).to(device, dtype).requires_grad_()
    logits, auxiliary = with_auxiliary(model, x)
    c1, c2 = (torch.from_numpy(vectors[f"cotangent/{name}"]).to(device, dtype) for name in ("logits", "aux"))
    ((logits * c1).sum() + (auxiliary * c2).sum()).backward()
    assert x.grad is not None
    return logits.detach(), auxiliary.detach(), x.grad


@functools.cache
def gradient_change_from_rounded_weights(dimensions: int) -> float:
    """How far, in float64 arithmetic, weights off by half a float32 ulp move the input's gradient at worst.

    Up to 1.6e-3: where rounding carries an input of a ReLU over zero the gradient jumps, so that no float32
    implementation, the authors' own included, can be held to less.
    """
    torch.manual_seed(0)
    worst = 0.0
    for _ in range(4):
        model, vectors, _ = load(dimensions, torch.float64, "reference")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + torch.finfo(torch.float32).eps / 2 * (2 * torch.rand_like(parameter) - 1))
        worst = max(worst, relative_error(gradients(model, vectors, torch.float64)[2], vectors["eval/grad_input"]))
    return worst


def skip_float64_on_triton(impl: str, dtype: torch.dtype) -> None:
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("its kernels compute in float32")


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_eval_outputs_and_gradients(
    dimensions: int, dtype: torch.dtype, tolerance: float, impl: str, device: torch.device
) -> None:
    skip_float64_on_triton(impl, dtype)
    model, vectors, state = load(dimensions, dtype, impl, device)
    logits, auxiliary, grad_input = gradients(model, vectors, dtype)
    assert relative_error(logits, vectors["eval/logits"]) < tolerance
    assert relative_error(auxiliary, vectors["eval/aux"]) < tolerance

    if dtype == torch.float32:
        tolerance = max(tolerance, 3 * gradient_change_from_rounded_weights(dimensions))
    assert relative_error(grad_input, vectors["eval/grad_input"]) < tolerance

    # Converting tensors that hold their own flat positions tells where each of our entries lies in the authors' layout.
    positions = convert_medformer_state_dict(
        {name: torch.arange(t.numel()).view(t.shape) for name, t in state.items()}, model.config
    )
    norms = dict(zip(vectors["eval/param_names"], vectors["eval/param_grad_norms"], strict=True))
    heads = dict(zip(vectors["eval/param_names"], vectors["eval/param_grad_heads"], strict=True))
    ours = dict(model.named_parameters())
    # Gradients that vanish in theory (a bias in front of an instance norm) are rounding noise of the larger ones.
    noise = 1e-3 * tolerance * max(norms.values())
    compared = 0
    for theirs in norms:
        converted = convert_medformer_state_dict({theirs: state[theirs]}, model.config)
        if not converted:
            assert norms[theirs] == 0, f"{theirs} gets a gradient in the authors' network and was dropped"
            continue
        (name,) = converted
        grad = ours[name].grad
        assert grad is not None, name
        flat = torch.empty(grad.numel(), dtype=torch.float64)
        flat[positions[name].flatten()] = grad.cpu().double().flatten()
        assert flat.norm().item() == pytest.approx(norms[theirs], rel=tolerance, abs=noise), name
        head, allowed = heads[theirs][: flat.numel()], tolerance * norms[theirs] + noise
        np.testing.assert_allclose(flat[:8], head, rtol=0, atol=allowed, err_msg=name)
        compared += 1
    assert compared == len(ours)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_train_mode_logits(
    dimensions: int, dtype: torch.dtype, tolerance: float, impl: str, device: torch.device
) -> None:
    skip_float64_on_triton(impl, dtype)
    model, vectors, _ = load(dimensions, dtype, impl, device)
    outputs = model.train()(torch.from_numpy(vectors["input"]).to(device, dtype))
    assert isinstance(outputs, tuple)
    assert relative_error(outputs[0], vectors["train/logits"]) < tolerance
