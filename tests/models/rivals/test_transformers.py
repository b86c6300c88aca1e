"""The Transformers among the rivals: published parameter counts, small twins, any input size, no idle parameter."""

from __future__ import annotations

import sys

import pytest
import torch

from utnetv2_fast.errors import InputError
from utnetv2_fast.models import (
    NETWORKS,
    PRESETS,
    SegmentationNetwork,
    Task,
    build_network,
    configure_network,
    count_parameters,
)
from utnetv2_fast.models.rivals import unetr
from utnetv2_fast.models.rivals.unetr import UNETRConfig

NAMES = [("r50-unet", 2), ("transunet", 2), ("swinunet", 2), ("unetr", 3), ("vt-unet", 3)]


def task(preset: str, in_channels: int = 1, patch_size: tuple[int, ...] | None = None) -> Task:
    return PRESETS[preset].task(in_channels, 4, patch_size)


def small(name: str, dimensions: int, in_channels: int = 1) -> SegmentationNetwork:
    """Of few channels, for patches of 64 x 64 or 16 x 32 x 24."""
    torch.manual_seed(0)
    shape = task(f"tiny-{dimensions}d", in_channels, {2: (64, 64), 3: (16, 32, 24)}[dimensions])
    return build_network(NETWORKS[name].configure(shape, 4))


@pytest.mark.parametrize(
    ("name", "preset", "millions"),
    [
        # ResNet, decoder, and 1.18 because its first convolution reads the ResNet's 1024 channels instead of 768.
        ("r50-unet", "acdc-2d", 11.89 + 7.39 + 1.18),
        ("transunet", "acdc-2d", 105.32),
        ("swinunet", "acdc-2d", 41.38),
        ("unetr", "acdc-3d", 92.4),
        ("vt-unet", "acdc-3d", 20.29),
    ],
)
def test_parameter_counts_are_the_published(name: str, preset: str, millions: float) -> None:
    """The planar ones with three input channels, to which a single one is repeated."""
    assert count_parameters(configure_network(name, task(preset))) / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize(("name", "dimensions"), NAMES)
def test_beside_a_small_preset_they_are_as_small(name: str, dimensions: int) -> None:
    chosen = task(f"tiny-{dimensions}d")
    wanted = count_parameters(configure_network("utnetv2", chosen))
    count = count_parameters(configure_network(name, chosen, equal_parameters=True))
    assert count == pytest.approx(wanted, rel=0.2)


@pytest.mark.parametrize(("name", "dimensions"), [("swinunet", 2), ("vt-unet", 3)])
def test_networks_of_swin_begin_as_swin_does(name: str, dimensions: int) -> None:
    network = small(name, dimensions)
    weights = torch.cat([m.weight.flatten() for m in network.modules() if isinstance(m, torch.nn.Linear)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.05)
    for module in network.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm) and module.bias is not None:
            assert not module.bias.any()


SIZES = {2: [(64, 64), (1, 1), (33, 90)], 3: [(16, 32, 24), (5, 17, 23)]}


@pytest.mark.parametrize(
    ("name", "dimensions", "size"), [(name, d, size) for name, d in NAMES for size in SIZES[d]], ids=str
)
def test_any_input_size_in_both_modes(name: str, dimensions: int, size: tuple[int, ...]) -> None:
    network = small(name, dimensions)
    for batch in (1, 2):
        x = torch.randn(batch, 1, *size)
        for logits in (network.train()(x), network.eval()(x)):
            assert logits.shape == (batch, 4, *size)
            assert torch.isfinite(logits).all()


@pytest.mark.parametrize(("name", "dimensions"), NAMES)
def test_every_parameter_gets_a_gradient(name: str, dimensions: int) -> None:
    network = small(name, dimensions, in_channels=2).train()
    network(torch.randn(2, 2, *SIZES[dimensions][0])).square().mean().backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not idle


@pytest.mark.parametrize(("name", "dimensions"), NAMES)
def test_samples_of_a_batch_do_not_touch_in_eval_mode(name: str, dimensions: int) -> None:
    network = small(name, dimensions).double().eval()
    x = torch.randn(2, 1, *SIZES[dimensions][1], dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(network(x)[1:], network(x[1:]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "dimensions"), NAMES)
def test_a_step_in_bfloat16_is_finite(name: str, dimensions: int) -> None:
    network = small(name, dimensions).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(torch.randn(2, 1, *SIZES[dimensions][0]))
    logits.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize(("patch", "padded"), [((16, 192, 192), (16, 192, 192)), ((40, 56, 40), (48, 64, 48))])
def test_unetr_takes_patches_of_any_size_and_nothing_larger(patch: tuple[int, ...], padded: tuple[int, ...]) -> None:
    config = NETWORKS["unetr"].configure(task("tiny-3d", patch_size=patch), 1)
    assert isinstance(config, UNETRConfig)
    assert config.padded_size(patch) == config.padded_size((3, 3, 3)) == padded
    with pytest.raises(ValueError, match="at most"):
        config.padded_size((patch[0], patch[1], padded[2] + 1))


@pytest.mark.parametrize("unused", [[], ["norm_cross_attn"], ["norm_cross_attn", "cross_attn"]])
def test_unetr_holds_nothing_of_a_cross_attention(unused: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a version of MONAI has of it."""

    def of_monai(**_: object) -> torch.nn.Module:
        network = torch.nn.Module()
        block = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ["attn", *unused]})
        network.vit = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([block])})
        return network

    monkeypatch.setattr(unetr, "_monai_unetr", lambda: of_monai)
    network = small("unetr", 3).network
    assert {name.split(".")[3] for name, _ in network.named_parameters()} == {"attn"}


def test_tokens_of_vt_unet_are_as_thick_as_the_data() -> None:
    assert NETWORKS["vt-unet"].configure(task("acdc-3d"), 1).patch == (1, 4, 4)
    assert NETWORKS["vt-unet"].configure(task("lits-3d"), 1).patch == (4, 4, 4)


@pytest.mark.parametrize("missing", ["monai.networks.nets", "einops"])
def test_without_monai_unetr_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=r'pip install "utnetv2-fast\[rivals\]"'):
        small("unetr", 3)
