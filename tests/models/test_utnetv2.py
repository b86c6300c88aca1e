"""The network: parameter counts of the published ones, any input size, no idle parameter, outputs by mode."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from utnetv2_fast.errors import InputError
from utnetv2_fast.models import PRESETS, UTNetV2, UTNetV2Config

TINY = {
    2: {"channels": (8, 8, 16, 16, 16), "heads": (2, 2, 2), "fusion_channels": 16, "fusion_heads": 2},
    3: {"channels": (4, 8, 8, 8, 8), "heads": (2, 2, 2), "fusion_channels": 16, "fusion_heads": 2},
}


def tiny(dimensions: int, **changes: object) -> UTNetV2:
    torch.manual_seed(0)
    fields = TINY[dimensions] | changes
    return UTNetV2.from_preset(f"tiny-{dimensions}d", in_channels=2, num_classes=3, **fields)


@pytest.mark.parametrize(
    ("preset", "in_channels", "classes", "millions"),
    [
        ("acdc-2d-medformer", 1, 4, 19.188 - 0.026624),
        ("acdc-3d-medformer", 1, 4, 21.826),
        ("bcv-3d-medformer", 1, 14, 36.669),
        ("lits-3d-medformer", 1, 3, 38.586),
    ],
)
def test_parameter_counts_are_the_authors(preset: str, in_channels: int, classes: int, millions: float) -> None:
    with torch.device("meta"):
        model = UTNetV2.from_preset(preset, in_channels=in_channels, num_classes=classes)
    count = sum(p.numel() for p in model.parameters())
    assert abs(count / 1e6 - millions) < 0.0006, count


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds_and_its_input_size_needs_no_padding(preset: str) -> None:
    with torch.device("meta"):
        model = UTNetV2.from_preset(preset, in_channels=1, num_classes=2)
    assert model.config.padded_size(PRESETS[preset].input_size) == PRESETS[preset].input_size


@pytest.mark.parametrize(
    ("dimensions", "size"), [(2, (1, 1)), (2, (16, 16)), (2, (33, 50)), (3, (5, 17, 31)), (3, (16, 16, 16))]
)
def test_any_input_size(dimensions: int, size: tuple[int, ...]) -> None:
    model = tiny(dimensions)
    x = torch.randn(2, 2, *size)
    logits, auxiliary = model.train()(x)
    assert logits.shape == auxiliary.shape == (2, 3, *size)
    assert torch.isfinite(logits).all()
    assert torch.isfinite(auxiliary).all()
    with torch.no_grad():
        assert model.eval()(x).shape == (2, 3, *size)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_padding_does_not_reach_into_an_input_that_fits(dimensions: int) -> None:
    model = tiny(dimensions).eval()
    x = torch.randn(1, 2, *(32,) * dimensions)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.forward_padded(x))


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("deep_supervision", [True, False])
def test_every_parameter_gets_a_gradient(dimensions: int, deep_supervision: bool) -> None:
    model = tiny(dimensions, deep_supervision=deep_supervision).train()
    outputs = model(torch.randn(2, 2, *(32,) * dimensions))
    assert isinstance(outputs, tuple) is deep_supervision
    sum(o.square().mean() for o in (outputs if deep_supervision else [outputs])).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None]
    assert not idle


@pytest.mark.parametrize("dimensions", [2, 3])
def test_channels_last_gives_the_same_logits(dimensions: int) -> None:
    model = tiny(dimensions).double().eval()
    x = torch.randn(2, 2, *(32,) * dimensions, dtype=torch.float64)
    channels_last = {2: torch.channels_last, 3: torch.channels_last_3d}[dimensions]
    with torch.no_grad():
        expected = model(x)
        actual = model.to(memory_format=channels_last)(x.to(memory_format=channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_token_maps_are_channels_last_on_a_cpu(dimensions: int) -> None:
    model = tiny(dimensions)
    stages = [model.stem, model.conv_down, *model.down, *model.up, *model.conv_up]
    strides: list[int] = []
    for stage in stages:
        stage.register_forward_hook(lambda module, inputs, out: strides.append(_token_map(out).stride(1)))
    model(torch.randn(2, 2, *(32,) * dimensions))
    assert strides == [1] * len(stages)


def _token_map(out: Tensor | tuple[Tensor, Tensor | None]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


# Tracing the backward pass of the 3D network takes a minute and a half: its operators are traced in their own tests.
@pytest.mark.parametrize(("dimensions", "backend"), [(2, "aot_eager"), (3, "eager")])
def test_compiles_without_graph_breaks(dimensions: int, backend: str) -> None:
    model = tiny(dimensions).double()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(2, 2, *(32,) * dimensions, dtype=torch.float64)
    expected, actual = model(x)[0], compiled(x)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
    actual.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# Small enough for Triton's interpreter.
SMALLEST = {"channels": (4, 4, 8, 8, 8), "fusion_channels": 8}


@pytest.mark.parametrize("dimensions", [2, 3])
def test_triton_trains_as_the_reference(dimensions: int, on_triton: torch.device) -> None:
    def run(impl: str, dtype: torch.dtype) -> list[torch.Tensor]:
        """Both outputs, and the gradients in one vector."""
        model = tiny(dimensions, impl=impl, **SMALLEST).to(on_triton, dtype)
        outputs = model(x.to(dtype))
        sum(o.square().mean() for o in outputs).backward()
        return [*outputs, torch.cat([p.grad.flatten() for p in model.parameters()])]

    x = torch.randn(2, 2, *(8, 16, 16)[-dimensions:], device=on_triton)
    results, eager, exact = (
        run("triton", torch.float32),
        run("reference", torch.float32),
        run("reference", torch.float64),
    )
    for got, want, true in zip(results, eager, exact, strict=True):
        assert (got - true).norm() <= 3 * (want - true).norm() + 1e-4 * true.norm()


def test_compiles_without_graph_breaks_on_triton(on_triton: torch.device) -> None:
    torch._dynamo.reset()
    model = tiny(2, impl="triton", **SMALLEST).to(on_triton)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 2, 16, 16, device=on_triton)
    expected, actual = model(x)[0], compiled(x)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    actual.square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_autocast_keeps_the_prediction_close() -> None:
    model = tiny(3).eval()
    x = torch.randn(1, 2, 16, 32, 32)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            actual = model(x)
    # bfloat16 has 8 bits; some forty layers with unit-variance norms between them lose a few percent.
    assert (actual.float() - expected).norm() < 0.1 * expected.norm()


def test_wrong_input_is_refused_by_shape() -> None:
    model = tiny(3)
    with pytest.raises(ValueError, match=r"x must be \(B, 2, D, H, W\), got \(1, 1, 8, 8, 8\)"):
        model(torch.zeros(1, 1, 8, 8, 8))
    with pytest.raises(ValueError, match="x must be"):
        model(torch.zeros(1, 2, 8, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernels": 3}, "Extra inputs"),
        ({"heads": (3, 4, 4)}, "must divide by heads"),
        ({"kernel_sizes": ((2, 3),) * 5}, "odd"),
        ({"scales": ((2, 2),) * 3}, "scales must be 4"),
        ({"map_size": (3,)}, "map_size"),
        ({"num_classes": 1}, "num_classes"),
    ],
)
def test_bad_configuration_is_refused(changes: dict[str, object], message: str) -> None:
    fields = PRESETS["tiny-2d"].fields | {"in_channels": 1, "num_classes": 2} | changes
    with pytest.raises(ValidationError, match=message):
        UTNetV2Config(**fields)


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(InputError, match="acdc-2d"):
        UTNetV2.from_preset("acdc", in_channels=1, num_classes=2)


def test_configuration_survives_json() -> None:
    config = UTNetV2Config(**PRESETS["acdc-3d"].fields, in_channels=1, num_classes=4)
    assert UTNetV2Config.model_validate_json(config.model_dump_json()) == config


def test_foreign_weights_are_refused_by_name() -> None:
    model = tiny(2)
    with pytest.raises(ValueError, match=r"stem\.conv\.weight has shape \(1,\)"):
        model.load_medformer_state_dict({"inc.conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="not that of a MedFormer"):
        model.load_medformer_state_dict({"down2.trans_blocks.blocks.0.attn.feat_qv.pointwise.weight": torch.zeros(3)})
