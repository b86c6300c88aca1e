"""Figures of cost show what has a score, and every operator as far as it was measured."""

from __future__ import annotations

import pytest

from utnetv2_fast.costs.figures import draw_networks, draw_operators
from utnetv2_fast.costs.networks import NetworkCost
from utnetv2_fast.costs.operators import Growth
from utnetv2_fast.evaluation.figures import png

COSTS = [
    NetworkCost("a", "A", parameters=2_000_000, flops=4 * 10**9),
    NetworkCost("b", "B", parameters=8_000_000, flops=10**9),
    NetworkCost("c", "C", parameters=8_000_000, flops=10**9),
    NetworkCost("d", "D", problem="needs something"),
]


def test_bubbles_stand_at_parameters_and_dice_with_the_area_of_operations() -> None:
    figure = draw_networks(COSTS, {"a": 0.9, "b": 0.8, "d": 0.7})
    first, second = figure.axes[0].lines
    assert (first.get_xdata()[0], first.get_ydata()[0]) == (2, 0.9)
    assert first.get_markersize() == pytest.approx(2 * second.get_markersize())
    assert len(figure.axes[0].texts) == 2
    assert png(figure).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="none of these"):
        draw_networks(COSTS, {"d": 0.7})


@pytest.mark.parametrize("known", [True, False])
def test_operators_are_drawn_as_far_as_they_were_measured(known: bool) -> None:
    sizes = [10, 40] if known else [None, None]
    growths = [
        Growth("a", "a", "n", 1, 1, "d", [256, 1024], [1.0, 4.0], sizes, [1, 4]),
        Growth("b", "b", "n²", 1, 1, "d", [256], [1.0], sizes[:1], [1]),
    ]
    figure = draw_operators(growths)
    assert [len(line.get_xdata()) for axes in figure.axes for line in axes.lines] == [2, 1] * 3
    assert png(figure).startswith(b"\x89PNG")
