"""Attention weights are those with which the operator computed, whichever path the block takes, and change nothing."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from utnetv2_fast.data.dataset import list_scans
from utnetv2_fast.data.phantom import write_phantom
from utnetv2_fast.data.plan import IntensityStatistics, Plan
from utnetv2_fast.errors import InputError
from utnetv2_fast.inference.predict import Predictor
from utnetv2_fast.inspection import (
    attention_maps,
    choose_stages,
    class_shares,
    inspect_case,
    mean_off_diagonal,
    observed,
    similarity,
    summarise,
)
from utnetv2_fast.models import NETWORKS, PRESETS, UTNetV2, build_network
from utnetv2_fast.nn.bidirectional_attention import BidirectionalAttention, split_heads
from utnetv2_fast.ops import reference

STAGES = ["encoder-2", "encoder-3", "encoder-4", "decoder-3", "decoder-2"]


TASK = PRESETS["tiny-2d"].task(in_channels=1, num_classes=4)


def network(preset: str, impl: str = "auto", **changes: object) -> UTNetV2:
    """In evaluation mode, with scores large enough for weights that are far from even."""
    model = UTNetV2.from_preset(preset, in_channels=1, num_classes=4, impl=impl, **changes).eval()
    for module in model.modules():
        if isinstance(module, BidirectionalAttention):
            module.map_qv.weight.data.mul_(5)
    return model


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("preset", "size"), [("tiny-2d", (40, 64)), ("tiny-3d", (16, 32, 32))])
def test_weights_aggregate_what_the_network_aggregates(
    preset: str, size: tuple[int, ...], impl: str, norm: str
) -> None:
    model = network(preset, impl, norm=norm)
    x = torch.randn(2, 1, *size)
    maps: list[torch.Tensor] = []
    handles = [
        module.map_out.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
        for module in model.modules()
        if isinstance(module, BidirectionalAttention) and module.map_out is not None
    ]
    with torch.no_grad():
        expected = model(x)
    for handle in handles:
        handle.remove()
    with torch.no_grad(), observed(model) as seen:
        assert torch.equal(model(x), expected)
    assert [(a.stage, a.block) for a in seen] == [(stage, 1) for stage in STAGES]
    assert [a.updates_map for a in seen] == [True] * 4 + [False]
    for attention, map_out in zip(seen[:4], maps, strict=True):
        torch.testing.assert_close(attention.aggregated(), map_out, rtol=1e-4, atol=1e-4)
    assert all("attend" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("spatial", [(6, 5), (3, 4, 2)])
def test_weights_are_those_of_the_reference(spatial: tuple[int, ...]) -> None:
    module = BidirectionalAttention(8, 12, 3, (3,) * len(spatial)).double().eval()
    x, semantic_map = torch.randn(2, 8, *spatial).double(), torch.randn(2, 12, 7).double()
    with torch.no_grad(), observed(module) as seen:
        module(x, semantic_map)
        q, v = (split_heads(t, 3) for t in module.token_qv(x).chunk(2, 1))
        map_q, map_v = (split_heads(t, 3) for t in module.map_qv(semantic_map).chunk(2, 1))
    scores = map_q @ q.mT / math.sqrt(4)
    _, map_out, column_lse = reference.bidirectional_attention(q, v, map_q, map_v, 0.5)
    (attention,) = seen
    assert attention.weights.shape == attention.shares.shape == (2, 3, 7, *spatial)
    torch.testing.assert_close(attention.weights.flatten(3), scores.softmax(-1))
    torch.testing.assert_close(attention.weights.flatten(3), (scores - column_lse.unsqueeze(-1)).exp())
    torch.testing.assert_close(attention.shares.flatten(3), scores.softmax(-2))
    torch.testing.assert_close(attention.weights.flatten(3) @ v, map_out)
    pooled = nn.functional.adaptive_avg_pool1d(v.mT.flatten(1, 2), 1)
    torch.testing.assert_close(attention.down_sampled((1,) * len(spatial)), pooled)


def test_weights_have_the_bias_for_relative_positions() -> None:
    module = BidirectionalAttention(8, 12, 3, (3, 3), positions=(2, 3)).double().eval()
    assert module.bias is not None
    module.bias.table.data.mul_(100)
    x, semantic_map = torch.randn(2, 8, 4, 5).double(), torch.randn(2, 12, 6).double()
    maps: list[torch.Tensor] = []
    assert module.map_out is not None
    module.map_out.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    with torch.no_grad(), observed(module) as seen:
        module(x, semantic_map)
    torch.testing.assert_close(seen[0].aggregated(), maps[0])


def test_a_network_is_left_as_it_was_when_it_fails() -> None:
    model = network("tiny-2d")
    with pytest.raises(ValueError, match="channels"), observed(model):
        model(torch.randn(1, 2, 32, 32))
    assert all("attend" not in vars(module) for module in model.modules())
    with pytest.raises(ValueError, match="evaluation"):
        attention_maps(model.train(), torch.randn(1, 1, 32, 32))


def test_autocast_reaches_the_network_and_not_the_weights() -> None:
    model = network("tiny-2d")
    x = torch.randn(1, 1, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        (first, *_) = attention_maps(model, x)
    assert first.weights.dtype == torch.float32
    torch.testing.assert_close(first.weights.flatten(3).sum(-1), torch.ones(1, 2, 9))


def test_stages_are_chosen_by_name() -> None:
    model = network("tiny-2d")
    assert choose_stages(model, ["decoder-3"]) == ["decoder-3"]
    with pytest.raises(InputError, match="choose among encoder-2, encoder-3, encoder-4, decoder-3"):
        choose_stages(model, ["decoder-2"])
    hybrid, alone = (build_network(NETWORKS[name].configure(TASK, 0)).eval() for name in ("map-2", "bmha-at-2x"))
    assert choose_stages(hybrid, ["decoder-3"]) == ["decoder-3"]
    assert [(a.stage, a.block) for a in attention_maps(hybrid, torch.randn(1, 1, 64, 64))] == [
        (stage, 1) for stage in STAGES
    ]
    assert [(a.stage, a.block) for a in attention_maps(alone, torch.randn(1, 1, 32, 32))] == [
        (stage, block) for stage in ("encoder-1", "decoder-1") for block in (1, 2)
    ]
    with pytest.raises(InputError, match="no bidirectional attention"):
        choose_stages(nn.Conv2d(1, 1, 1), [])


def test_shares_count_the_voxels_that_a_position_covers() -> None:
    label = torch.zeros(8, 8, dtype=torch.long)
    label[:, 4:] = 2
    label[:2, 4:] = 1
    weights = torch.zeros(1, 3, 2, 2)
    weights[0, 0] = 1 / 4
    weights[0, 1, 0, 1] = weights[0, 2, 1, 0] = 1
    expected = torch.tensor([[[0.5, 0.125, 0.375], [0, 0.5, 0.5], [1, 0, 0]]])
    torch.testing.assert_close(class_shares(weights, label, 3), expected)


def test_similarity_is_one_for_tokens_of_one_direction_and_zero_across() -> None:
    tokens = torch.tensor([[[1.0, 0, -3], [0, 2, 0]]])  # (B, C, l)
    matrix = similarity(tokens)[0]
    torch.testing.assert_close(matrix, torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]]))
    assert mean_off_diagonal(matrix) == pytest.approx(1 / 3)
    assert math.isnan(mean_off_diagonal(torch.ones(1, 1)))


@pytest.mark.parametrize("patch_size", [(16, 32, 32), (48, 160, 32)])
def test_a_window_of_a_volume_is_shown_by_its_slice(tmp_path: Path, patch_size: tuple[int, int, int]) -> None:
    write_phantom(tmp_path, patients=1)
    known = IntensityStatistics(mean=0, std=1, median=0, minimum=0, maximum=1, percentile_00_5=0, percentile_99_5=1)
    plan = Plan(
        dataset="demo",
        dimensions=3,
        labels={"background": 0, "RV": 1, "MYO": 2, "LV": 3},
        channels=("MRI",),
        axes=(2, 1, 0),
        slices_first=True,
        spacing=(4.0, 4.0, 4.0),
        median_shape=(20, 64, 64),
        normalisation=("zscore",),
        intensities=(known,),
    )
    predictor = Predictor([network("tiny-3d")], plan, patch_size, torch.device("cpu"))
    (case,) = list_scans([tmp_path / "imagesTr"], 1)[:1]
    inspection = inspect_case(predictor, case)
    assert inspection.axes == (1, 2)  # across the scan's own slices, not the plan's
    shape = inspection.image.shape
    assert inspection.label.shape == shape
    assert all(n <= p for n, p in zip(shape, patch_size[1:], strict=True))
    assert inspection.areas.sum() == pytest.approx(1)
    for block in inspection.blocks:
        assert block.maps.shape == (*block.weights.shape[:2], *shape)
        np.testing.assert_allclose(block.weights.sum(axis=(2, 3, 4)), 1, rtol=1e-4)
        np.testing.assert_allclose(block.shares.sum(axis=2), 1, rtol=1e-4)
    summary = summarise(inspection)
    assert len(summary["blocks"]) == 4
    assert summary["blocks"][0]["tokens"][-1]["head"] == 2
    assert summary["blocks"][0]["tokens"][-1]["token"] == 27
