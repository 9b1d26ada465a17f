"""Curves where their numbers say, and an axis one can read."""

import math

import numpy as np
import pytest
from PIL import ImageColor

from minidiff import charts, images, training

FRAME = (charts.LEFT, charts.TOP, charts.LEFT + charts.WIDTH, charts.TOP + charts.HEIGHT)


def coloured(page, i: int, box=FRAME) -> tuple[np.ndarray, np.ndarray]:
    """Where pixels of the i-th colour, also thinned with white, are in this box: rows, columns."""
    left, top, right, bottom = box
    ink = 255 - np.asarray(page).astype(float)[top:bottom, left:right]
    colour = 255 - np.array(ImageColor.getrgb(charts.COLOURS[i]), dtype=float)
    share = ink @ colour / (colour @ colour)
    return np.nonzero((share > 0.4) & (np.abs(ink - share[..., None] * colour).max(2) < 12))


def row_of(value: float, low: float, high: float) -> float:
    """Where a value belongs on an axis that goes on by a twentieth on either side of low and high."""
    return charts.HEIGHT * (math.log(high / value) / math.log(high / low) + 0.05) / 1.1


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


def test_every_panel_has_its_own_lines_and_the_levels_and_the_legend_has_each_once():
    names = {f"a level with a long name, number {i}": 0.1 * (i + 1) for i in range(4)}
    panels = [("whole run", {"a": [(1, 1.0), (9, 0.05)]}), ("first", {"a": [(1, 1.0), (2, 0.09)]})]
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


def test_an_axis_follows_its_lines_and_not_the_peak_of_the_first_steps_or_a_level_beyond():
    """Of 100 values two may lie above: 30 and 20 do, 0.9 is the highest that counts. The peak ends at the frame."""
    falling = [(1, 30.0), (2, 20.0)] + [(step, 0.9 - 0.008 * (step - 3)) for step in range(3, 101)]  # down to 0.124
    low, high = charts.value_range([falling, [(100, 0.2)]])
    beyond = (0.9 / 0.124) ** 0.05
    assert (low, high) == pytest.approx((0.124 / beyond, 0.9 * beyond))
    assert charts.value_range([[(step, 1.0 / step) for step in range(1, 50)]])[1] == pytest.approx(49**0.05)
    assert charts.value_range([[(1, 0.5)], [(1, 0.55)]]) == pytest.approx((0.5 / 1.1**0.5, 0.55 * 1.1**0.5))
    page = charts.chart([("", {"a": falling})], {"below": 0.1, "above": 1.1, "near": 0.5})
    rows, columns = coloured(page, 0)
    assert rows.min() <= 2 and columns[rows <= 2].max() < 20
    assert abs(rows[columns > charts.WIDTH - 12].max() - row_of(0.124, 0.124, 0.9)) < 3
    around = [(0, 0, page.width, FRAME[1] - 2), (0, FRAME[3] + 2, page.width, FRAME[3] + charts.BOTTOM - 12)]
    legend = (0, FRAME[3] + charts.BOTTOM - 8, page.width, page.height)
    for i, inside in ((0, True), (1, False), (2, False), (3, True)):  # levels outside stand in the legend alone
        assert bool(len(coloured(page, i)[0])) is inside and len(coloured(page, i, legend)[0])
        assert not any(len(coloured(page, i, box)[0]) for box in around)


def write_run(folder, losses, held_out=()):
    (folder / "training").mkdir(parents=True)
    for name, rows in (("loss.csv", losses), ("test.csv", held_out)):
        if rows:
            training.add_rows(folder / "training" / name, ("step", "loss"), rows)
    return folder


def test_the_curves_of_two_runs_come_into_one_chart_with_the_names_of_their_folders(tmp_path, monkeypatch):
    """500 rows are shown as means of 3: (1 + 2 + 3) / 3 = 2 at step 3, and last (499 + 500) / 2 at step 500."""
    drawn, chart = [], charts.chart
    monkeypatch.setattr(charts, "chart", lambda *args: drawn.append(args) or chart(*args))
    long = write_run(tmp_path / "long", [(s, float(s)) for s in range(1, 501)], [(250, 4.5), (500, 2.5)])
    short = write_run(tmp_path / "short", [(10, 6.0), (20, 3.0), (30, 0.3), (40, 7.0)])
    charts.main([str(long), str(short), "--out", str(tmp_path / "c.png")])
    (((title, training), (other, held_out)), levels), *_ = drawn
    assert (title, other, levels) == ("training, means of 3 values", "held-out images", {})
    assert len(training["long"]) == 167 and training["long"][0] == (3, 2.0) and training["long"][-1] == (500, 499.5)
    assert training["short"] == [(30, pytest.approx(3.1)), (40, 7.0)]
    assert held_out == {"long": [(250, 4.5), (500, 2.5)], "short": []}
    assert images.load(tmp_path / "c.png").shape[3] == 2 * (charts.LEFT + charts.WIDTH + charts.RIGHT)
    twin = write_run(tmp_path / "other" / "short", [(10, 6.0)])
    charts.main([str(short), str(twin), "--out", str(tmp_path / "c.png")])
    rows = {str(short): [(10, 6.0), (20, 3.0), (30, 0.3), (40, 7.0)], str(twin): [(10, 6.0)]}
    assert drawn[1][0] == [("training", rows)]


def test_a_folder_without_curves_is_named(tmp_path, capsys):
    run = write_run(tmp_path / "run", [(1, 1.0)])
    with pytest.raises(SystemExit, match="2"):
        charts.main([str(run), str(tmp_path / "none"), "--out", str(tmp_path / "c.png")])
    where = tmp_path / "none" / "training" / "loss.csv"
    assert f"no losses in {where}; pass folders that trainers had as --out" in capsys.readouterr().err


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


@pytest.mark.parametrize("row", ["2,abc", "2", "x,1", "2,nan", "2,inf", "2,0.5,nan", "2,0.5\udcff"])
def test_a_broken_row_is_found_in_its_file(tmp_path, row):
    path = tmp_path / "loss.csv"
    path.write_bytes(f"step,loss\n1,0.5\n{row}\n".encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"loss.csv has a broken row \(.*\); take it out"):
        charts.read_rows(path)
