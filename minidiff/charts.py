"""Loss curves, of one run or of several in one chart: lines over the steps on a logarithmic axis, reference levels.

    python -m minidiff.charts out/mnist/flow-class out/mnist/flow-no-scheduler

A trainer draws its own loss.png with `plot`. The command puts the curves of several runs into out/curves.png: on the
left the losses in training, on the right the losses on held-out images.

This is plumbing: skim it.
"""

import argparse
import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from minidiff import images
from minidiff.cli import command, cost, file_path, finite, settings

Points = Sequence[tuple[int, float]]  # step, value

WIDTH, HEIGHT = 420, 300  # of a panel's frame, in pixels
LEFT, TOP, RIGHT, BOTTOM = 70, 36, 20, 58  # around it
MARGIN = 0.02  # of a frame that stays free at its left and right
FONT_SIZE, LEGEND_HEIGHT = 13, 26
FINE = 3  # all is drawn so many times as large and then reduced, which smooths it
DOTTED = 60  # a line of at most so many points shows them
PEAK = 50  # of each line, the highest 1 in PEAK values may lie above the frame
LEAST = 1.21  # an axis reaches at least from its lowest value to LEAST times it, so that round numbers lie on it
MEANS = 200  # points of a line of losses when several runs share a panel: each is a mean
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b")


def chart(panels: Sequence[tuple[str, Mapping[str, Points]]], levels: Mapping[str, float]) -> Image.Image:
    """Panels side by side, each with a title and named lines of points (step, value); one legend below all.

    levels: dashed lines across every panel whose axis reaches them. The lines alone decide how far an axis reaches
    (`value_range`). Values must be finite; those of 0 or less have no place on the axis and are left out.
    """
    levels = {name: value for name, value in levels.items() if value > 0}
    names = list(dict.fromkeys([*(name for _, lines in panels for name in lines), *levels]))
    colours = dict(zip(names, itertools.cycle(COLOURS)))
    font = ImageFont.load_default(size=FINE * FONT_SIZE)
    width = FINE * len(panels) * (LEFT + WIDTH + RIGHT)
    entries, x, y = [], FINE * LEFT, FINE * (TOP + HEIGHT + BOTTOM)
    for name in names:  # the legend, in as many rows as it needs
        length = round(font.getlength(name)) + FINE * 60
        if entries and x + length > width:
            x, y = FINE * LEFT, y + FINE * LEGEND_HEIGHT
        entries.append((name, x, y))
        x += length
    page = Image.new("RGB", (width, y + FINE * LEGEND_HEIGHT), "white")
    draw = ImageDraw.Draw(page)
    for i, (title, lines) in enumerate(panels):
        _panel(draw, FINE * (i * (LEFT + WIDTH + RIGHT) + LEFT), title, lines, levels, colours, font)
    for name, x, y in entries:
        _line(draw, [(x, y), (x + FINE * 24, y)], colours[name], dashed=name in levels)
        draw.text((x + FINE * 30, y), name, "black", font, anchor="lm")
    return page.reduce(FINE)


def _panel(
    draw: ImageDraw.ImageDraw, left: int, title: str, lines: Mapping[str, Points], levels: Mapping[str, float],
    colours: Mapping[str, str], font: ImageFont.FreeTypeFont,
) -> None:  # fmt: skip
    """One frame, `left` pixels from the left, and what is in and around it."""
    top, w, h = FINE * TOP, FINE * WIDTH, FINE * HEIGHT
    lines = {name: [(x, y) for x, y in points if y > 0] for name, points in lines.items()}
    steps = [x for points in lines.values() for x, _ in points] or [0]
    first, last = min(steps), max(max(steps), min(steps) + 1)
    low, high = map(math.log, value_range(list(lines.values())))

    def at(x: float, y: float) -> tuple[float, float]:
        across = MARGIN + (1 - 2 * MARGIN) * (x - first) / (last - first)
        return left + w * across, top + h * max(high - math.log(y), 0) / (high - low)  # a peak ends at the frame

    for x in step_ticks(first, last):
        place, _ = at(x, 1)
        draw.line([(place, top), (place, top + h)], "#e6e6e6", FINE)
        draw.text((place, top + h + FINE * 5), f"{x:g}", "black", font, anchor="ma")
    for y in value_ticks(math.exp(low), math.exp(high)):
        _, place = at(0, y)
        draw.line([(left, place), (left + w, place)], "#e6e6e6", FINE)
        draw.text((left - FINE * 5, place), f"{y:g}", "black", font, anchor="rm")
    for name, points in lines.items():
        _line(draw, [at(x, y) for x, y in points], colours[name], dots=len(points) <= DOTTED)
    for name in (name for name, y in levels.items() if low <= math.log(y) <= high):
        _, place = at(first, levels[name])
        _line(draw, [(left, place), (left + w, place)], colours[name], dashed=True)
    draw.rectangle((left, top, left + w, top + h), outline="black", width=FINE)
    draw.text((left + w / 2, top - FINE * 12), title, "black", font, anchor="ms")
    draw.text((left + w / 2, top + h + FINE * (BOTTOM - 18)), "step", "black", font, anchor="ms")
    draw.text((left - FINE * 40, top - FINE * 12), "loss", "black", font, anchor="ls")


def _line(draw: ImageDraw.ImageDraw, points: Points, colour: str, dashed: bool = False, dots: bool = False) -> None:
    if dashed:  # between two points of the same height
        (start, y), (end, _) = points
        for x in range(round(start), round(end), FINE * 8):
            draw.line([(x, y), (min(x + FINE * 5, end), y)], colour, FINE)
        return
    draw.line(points, colour, FINE if dots else FINE - 1)
    for x, y in points if dots else ():
        draw.ellipse((x - FINE * 2, y - FINE * 2, x + FINE * 2, y + FINE * 2), colour)


def value_range(lines: Sequence[Points]) -> tuple[float, float]:
    """The ends of an axis: a twentieth of the way from the lowest to the highest value beyond both, all in logarithms.

    The values are greater than 0. Of each line the highest one in PEAK does not count: in its first steps a network
    errs by many times more than ever after, and the rest would lie flat at the bottom.
    """
    kept = [y for points in lines for y in sorted(y for _, y in points)[: len(points) - len(points) // PEAK]] or [1]
    low, high = math.log(min(kept)), math.log(max(kept))
    beyond = max((high - low) / 20, (math.log(LEAST) - (high - low)) / 2)
    return math.exp(low - beyond), math.exp(high + beyond)


def step_ticks(first: int, last: int) -> list[int]:
    """At most seven round numbers, equally far apart, from first to last."""
    distances = (digit * 10**size for size in itertools.count() for digit in (1, 2, 5))
    apart = next(d for d in distances if last // d - (first - 1) // d <= 7)
    return list(range(-(-first // apart) * apart, last + 1, apart))


def value_ticks(low: float, high: float) -> list[float]:
    """At most eight round numbers from low to high, as a logarithmic axis has them: 0.01, 0.02, 0.05, 0.1, ..."""
    sizes = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    finer = [([n / parts for n in range(parts, 10 * parts)], 1) for parts in (20, 10, 5, 2, 1)]
    for digits, every in (*finer, ((1, 2, 5), 1), *(((1,), every) for every in (1, 2, 5, 10, 20))):
        ticks = [float(f"{digit}e{size}") for size in sizes if size % every == 0 for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= 8:
            break
    return ticks


# ---------------------------------------------------------------------------------------------- runs


def read_rows(path: Path) -> list[tuple[int, ...]]:
    """The rows of a table of numbers, without its header: (step, ...); none if there is no such file.

    Raises ValueError that names the file if a row is broken.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline="") as file:
            rows = list(csv.reader(file))[1:]
        return [(int(step), finite(value), *map(finite, more)) for step, value, *more in rows]
    except (ValueError, csv.Error, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{path} has a broken row ({error}); take it out") from None


def plot(folder: Path, part: int, levels: Mapping[str, float]) -> None:
    """loss.png: the whole run and, if it is longer, its first and its last `part` steps; levels as dashed lines."""
    losses, held_out = read_rows(folder / "loss.csv"), read_rows(folder / "test.csv")
    if not losses:
        return
    lines = {"training": losses} | ({"held-out images": held_out} if held_out else {})
    last, panels = losses[-1][0], [("whole run", lines)]
    if last > part:
        begin = part * ((last - 1) // part)
        for start, end in ((0, part), (begin, last)):
            rows = [row for row in losses if start < row[0] <= end]
            panels.append((f"steps {start + 1} to {end}", {"training": rows}))
    page = chart(panels, {f"{name}: {level:.4f}": level for name, level in levels.items()})
    images.save(page, folder / "loss.png", {})


def compared(runs: Sequence[Path]) -> Image.Image:
    """The curves of several runs in one chart: the losses in training, and on held-out images where there are any.

    runs: the --out of trainers; the names of these folders stand in the legend. In training a point is the mean of n
    rows of loss.csv, so many that the longest run has at most MEANS points.
    Raises ValueError if a run has no losses.
    """
    if not (runs := [Path(run) for run in runs]):
        raise ValueError("no runs; pass folders that trainers had as --out")
    names = [run.name if [other.name for other in runs].count(run.name) == 1 else str(run) for run in runs]
    losses, held_out = ([read_rows(run / "training" / file) for run in runs] for file in ("loss.csv", "test.csv"))
    for run, rows in zip(runs, losses):
        if not rows:
            raise ValueError(f"no losses in {run / 'training' / 'loss.csv'}; pass folders that trainers had as --out")
    n = -(-max(map(len, losses)) // MEANS)
    means = [[(rows[i : i + n][-1][0], sum(y for _, y in rows[i : i + n]) / len(rows[i : i + n]))
              for i in range(0, len(rows), n)] for rows in losses]  # fmt: skip
    panels = [("training" + (f", means of {n} values" if n > 1 else ""), dict(zip(names, means)))]
    return chart(panels + [("held-out images", dict(zip(names, held_out)))] * any(held_out), {})


@command
def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", type=file_path, nargs="+", metavar="RUN", help="a folder that a trainer had as --out")
    p.add_argument("--out", type=file_path, default=Path("out/curves.png"), help="image (default %(default)s)")
    args = p.parse_args(argv)
    images.check_output(args.out)
    images.save(compared(args.runs), args.out, settings(args, "charts"))
    print(f"wrote {args.out}   ({cost()})")


if __name__ == "__main__":
    main()
