"""Loss curves: lines over the steps of a run on a logarithmic axis, with reference levels.

This is plumbing: skim it.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

Points = Sequence[tuple[int, float]]  # step, value

WIDTH, HEIGHT = 420, 300  # of a panel's frame, in pixels
LEFT, TOP, RIGHT, BOTTOM = 70, 36, 20, 58  # around it
MARGIN = 0.02  # of a frame that stays free at its left and right
FONT_SIZE, LEGEND_HEIGHT = 13, 26
FINE = 3  # all is drawn so many times as large and then reduced, which smooths it
DOTTED = 60  # a line of at most so many points shows them
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b")


def chart(panels: Sequence[tuple[str, Mapping[str, Points]]], levels: Mapping[str, float]) -> Image.Image:
    """Panels side by side, each with a title and named lines of points (step, value); one legend below all.

    levels: dashed lines across every panel. Values must be finite; those of 0 or less have no place on the axis and are
    left out.
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
    values = [y for points in lines.values() for _, y in points] + list(levels.values()) or [1]
    first, last = min(steps), max(max(steps), min(steps) + 1)
    low, high = math.log(min(values) / 1.1), math.log(max(values) * 1.1)

    def at(x: float, y: float) -> tuple[float, float]:
        across = MARGIN + (1 - 2 * MARGIN) * (x - first) / (last - first)
        return left + w * across, top + h * (high - math.log(y)) / (high - low)

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
    for name, y in levels.items():
        _, place = at(first, y)
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
