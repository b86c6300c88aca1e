"""Figures of attention hold what fits, turned as the scan is, on one scale."""

from __future__ import annotations

import numpy as np
import pytest

from utnetv2_fast.attention_figures import draw_block, draw_overview, draw_similarity, last_blocks
from utnetv2_fast.evaluation.figures import png
from utnetv2_fast.inspection import InspectedBlock, Inspection


def block(stage: str, number: int, heads: int, tokens: int) -> InspectedBlock:
    random = np.random.default_rng(0)
    weights = random.random((heads, tokens, 4, 4)).astype(np.float32)
    return InspectedBlock(
        stage=stage,
        block=number,
        weights=weights / weights.sum(axis=(2, 3), keepdims=True),
        maps=random.random((heads, tokens, 16, 24)).astype(np.float32),
        shares=random.dirichlet(np.ones(3), (heads, tokens)).astype(np.float32),
        aggregated=np.eye(tokens, dtype=np.float32),
        down_sampled=np.ones((tokens, tokens), dtype=np.float32),
    )


def inspection(*blocks: InspectedBlock) -> Inspection:
    label = np.zeros((16, 24), np.uint8)
    label[4:8, 4:8] = 2
    image = np.linspace(0, 1, label.size, dtype=np.float32).reshape(label.shape)
    return Inspection(
        case="case_$1$",
        image=image,
        label=label,
        spacing=(2.0, 1.5),
        axes=(1, 2),
        position="slice 3 of 9",
        classes=("background", "RV", "LV"),
        areas=np.array([0.9, 0.0, 0.1], np.float32),
        blocks=blocks,
    )


@pytest.mark.parametrize(("heads", "tokens", "rows", "columns"), [(2, 4, 2, 4), (1, 1, 1, 1), (20, 64, 16, 9)])
def test_every_head_has_a_row_and_tokens_as_many_columns_as_fit(
    heads: int, tokens: int, rows: int, columns: int
) -> None:
    found = inspection(block("encoder-2", 1, heads, tokens))
    figure = draw_block(found, found.blocks[0])
    assert len(figure.axes) == rows * (1 + columns) + 1
    for axes in figure.axes[:-1]:
        box = axes.get_position()
        assert min(box.x0, box.y0) >= 0
        assert max(box.x1, box.y1) <= 1.0001
    assert png(figure).startswith(b"\x89PNG")
    assert png(draw_similarity(found)).startswith(b"\x89PNG")


def test_of_many_tokens_those_far_from_even_are_shown() -> None:
    found = block("encoder-2", 1, 1, 12)
    found.weights[:] = 1 / 16
    found.weights[0, 10] = 0
    found.weights[0, 10, 0, 0] = 1
    titles = [axes.get_title(loc="left") for axes in draw_block(inspection(found), found).axes]
    assert "token 11" in titles
    assert len([title for title in titles if title.startswith("token")]) == 9


def test_the_overview_has_the_last_block_of_each_stage_and_each_class() -> None:
    found = inspection(block("encoder-2", 1, 2, 3), block("encoder-2", 2, 2, 3), block("decoder-3", 1, 4, 3))
    assert [(b.stage, b.block) for b in last_blocks(found)] == [("encoder-2", 2), ("decoder-3", 1)]
    figure = draw_overview(found)
    assert len(figure.axes) == 2 * 4 + 1
    notes = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert notes[0] == f"{100 * found.blocks[1].shares[..., 0].max():.0f} %"
    # The lower right of the array is the upper left of the picture, with the scan below it.
    scan, weights = figure.axes[1].images
    np.testing.assert_array_equal(scan.get_array(), found.image[::-1, ::-1])
    assert weights.get_extent() == scan.get_extent()
    place = np.unravel_index(found.blocks[1].shares[..., 0].argmax(), (2, 3))
    np.testing.assert_array_equal(weights.get_array(), found.blocks[1].maps[place][::-1, ::-1])


def test_similarities_are_told_by_their_means() -> None:
    figure = draw_similarity(inspection(block("encoder-2", 1, 2, 4)))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:2] == ["mean 1.00", "encoder-2\nmean 0.00"]
