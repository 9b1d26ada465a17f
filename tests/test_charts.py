"""Curves where their numbers say, and an axis one can read."""

import math

import numpy as np
import pytest
from PIL import ImageColor

from minidiff import charts

FRAME = (charts.LEFT, charts.TOP, charts.LEFT + charts.WIDTH, charts.TOP + charts.HEIGHT)


def coloured(page, i: int, box=FRAME) -> tuple[np.ndarray, np.ndarray]:
    """Where pixels of the i-th colour, also thinned with white, are in this box: rows, columns."""
    left, top, right, bottom = box
    ink = 255 - np.asarray(page).astype(float)[top:bottom, left:right]
    colour = 255 - np.array(ImageColor.getrgb(charts.COLOURS[i]), dtype=float)
    share = ink @ colour / (colour @ colour)
    return np.nonzero((share > 0.4) & (np.abs(ink - share[..., None] * colour).max(2) < 12))


def row_of(value: float, low: float, high: float) -> float:
    """Where a value belongs, with a tenth more on either side of low and high."""
    return charts.HEIGHT * math.log(1.1 * high / value) / math.log(1.21 * high / low)


def column_of(share: float) -> float:
    return charts.WIDTH * (charts.MARGIN + (1 - 2 * charts.MARGIN) * share)


def test_lines_and_levels_are_where_their_values_are_on_a_logarithmic_axis():
    page = charts.chart([("", {"falling": [(1, 1.0), (51, 0.1), (101, 0.01)], "point": [(76, 0.5)]})], {"level": 0.02})
    rows, columns = coloured(page, 0)
    for step, value in ((1, 1.0), (51, 0.1), (101, 0.01)):
        x = column_of((step - 1) / 100)
        near = rows[np.abs(columns - x) <= 3]
        assert abs(near.mean() - row_of(value, 0.01, 1.0)) < 3, (step, value)
    rows, columns = coloured(page, 1)
    assert abs(rows.mean() - row_of(0.5, 0.01, 1.0)) < 1 and abs(columns.mean() - column_of(0.75)) < 1
    rows, columns = coloured(page, 2)
    assert np.abs(rows - row_of(0.02, 0.01, 1.0)).max() < 2
    assert columns.min() < 5 and columns.max() > charts.WIDTH - 9 and 0.4 < len(set(columns)) / charts.WIDTH < 0.8


def test_every_panel_has_its_own_lines_and_all_levels_and_the_legend_has_each_once():
    names = {f"a level with a long name, number {i}": 0.1 * (i + 1) for i in range(4)}
    panels = [("whole run", {"a": [(1, 1.0), (9, 0.5)]}), ("first", {"a": [(1, 1.0), (2, 0.9)]})]
    page = charts.chart(panels, names)
    one, two = charts.chart(panels[:1], {}), charts.chart(panels, {})
    assert two.width == 2 * one.width == page.width
    assert page.height > two.height == one.height  # one row of the legend is not enough
    for x in (0, two.width // 2):
        frame = (FRAME[0] + x, FRAME[1], FRAME[2] + x, FRAME[3])
        assert all(len(coloured(page, i, frame)[0]) > 50 for i in range(5))
    below = (0, FRAME[3] + charts.BOTTOM - 8, page.width, page.height)
    for i in range(5):  # a stroke of 24 pixels before the name
        assert 10 < len(set(coloured(page, i, below)[1])) < 30, i


def test_few_points_are_shown_as_dots():
    few, many = (charts.chart([("", {"a": [(i + 1, 1.0) for i in range(n)]})], {}) for n in (5, charts.DOTTED + 1))
    assert len(set(coloured(few, 0)[0])) >= 4 > len(set(coloured(many, 0)[0]))


@pytest.mark.parametrize("values", [[], [0.0], [1.0], [0.0, -1.0, 2.0], [1e-30, 3e38]])
def test_odd_values_are_drawn_too(values):
    page = charts.chart([("", {"a": list(enumerate(values, 1))})], {"zero": 0.0})
    assert bool(len(coloured(page, 0)[0])) == any(value > 0 for value in values)


@pytest.mark.parametrize(
    "first, last, ticks",
    [(1, 2, [1, 2]), (1, 5, [1, 2, 3, 4, 5]), (1, 9370, [2000, 4000, 6000, 8000]), (469, 938, range(500, 901, 100))],
)
def test_step_ticks(first, last, ticks):
    assert charts.step_ticks(first, last) == list(ticks)


@pytest.mark.parametrize(
    "low, high, ticks",
    [
        (0.003, 0.5, [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]),
        (0.03, 0.05, [0.03, 0.035, 0.04, 0.045, 0.05]),
        (1.0, 1.21, [1.0, 1.05, 1.1, 1.15, 1.2]),
        (0.3, 7.0, [0.5, 1.0, 2.0, 5.0]),
        (1e-5, 1e5, [1e-4, 1e-2, 1.0, 1e2, 1e4]),
    ],
)
def test_value_ticks(low, high, ticks):
    assert charts.value_ticks(low, high) == pytest.approx(ticks)


def test_an_axis_always_has_two_to_eight_round_numbers():
    for low in (1e-30, 1e-3, 0.0217, 0.99, 7.0):
        for factor in (1.21, 1.4, 2, 3, 5, 9, 11, 99, 1001, 1e7, 1e30):
            assert 2 <= len(charts.value_ticks(low, low * factor)) <= 8, (low, factor)
