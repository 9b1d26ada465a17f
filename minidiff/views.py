"""Optical views: turning, mirroring or shuffling an image so that another one appears.

Read `sampling.py` first. An anagram denoises one image as several: before the network looks, a *view* rearranges
x_t, and what the network says is rearranged back by the inverse. That only works if the view

    is linear, so that image and noise may be viewed separately:    V(a x + b noise) = a V x + b V noise
    is orthogonal, so that Gaussian noise stays Gaussian noise of the same strength:  V V^T = I

Every permutation of pixels qualifies, and so does the negative. `check` measures both, and says why a bad view is bad:

    python -m minidiff.anagram --check rotate_180
    python -m minidiff.anagram --check blur_failure

Source: the Visual Anagrams paper. Permutations checked against dangeng/visual_anagrams
visual_anagrams/views/permutations.py@1d06220; skew and the views that fail are built from their descriptions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff import jigsaw as puzzle

JIGSAW_SEED = 4522


@dataclass(frozen=True)
class View:
    """A way to look at an image, and the way back. All functions are pure, on (..., C, H, W).

    C is 3, or in stage 2 6: the colors of x_t, then those of the low-resolution image. A view treats both alike.
    view: applied to what the network sees.
    inverse_view: applied to its eps.  inverse_variance: to its pred_var, which moves with the pixels but has no sign.
    order: size -> (size^2,) int64, if the view is a permutation: pixel p of the view is pixel order[p] of the image.
    turns: size -> (size^2, 2), the point (y, x) about which each pixel travels in an animation; None: straight.
    """

    name: str
    view: Callable[[Tensor], Tensor]
    inverse_view: Callable[[Tensor], Tensor]
    inverse_variance: Callable[[Tensor], Tensor]
    order: Callable[[int], Tensor] | None = None
    turns: Callable[[int], Tensor] | None = None


def permutation(name: str, rearrange: Callable[[Tensor], Tensor], turns: Callable[[int], Tensor] | None = None) -> View:
    """The view that moves pixels as `rearrange` moves the entries of a grid (size, size)."""

    def order(size: int) -> Tensor:
        return rearrange(torch.arange(size * size).view(size, size)).flatten()

    def moved(x: Tensor, places: Tensor) -> Tensor:
        return x.flatten(-2)[..., places.to(x.device)].view(x.shape)

    def back(x: Tensor) -> Tensor:
        return moved(x, order(side_of(x)).argsort())

    return View(name, lambda x: moved(x, order(side_of(x))), back, back, order, turns)


def negate() -> View:
    """Light and dark exchanged, in [-1, 1]: -x. The variance has no sign and stays."""
    return View("negate", torch.neg, torch.neg, lambda x: x)


def skew(factor: float = 1.5) -> View:
    """Column i moves down by int(factor (i - W/2)), and what leaves below comes in above."""
    return _rolled(f"skew:{factor:g}", lambda W: [int(factor * (i - W // 2)) for i in range(W)])


def skew_by(pixels: float = 50) -> View:
    """Columns move by up to so many pixels of 64, evenly from up (left) to down (right)."""
    name = f"skew_by:{pixels:g}"
    return _rolled(name, lambda W: np.linspace(-pixels * W / 64, pixels * W / 64, W).round().astype(int).tolist())


def _rolled(name: str, shifts: Callable[[int], list[int]]) -> View:
    """Column i of W moves down by shifts(W)[i]."""

    def rearrange(grid: Tensor) -> Tensor:
        return torch.stack([grid[:, i].roll(shift) for i, shift in enumerate(shifts(len(grid)))], dim=1)

    return permutation(name, rearrange)


def patch_permute(patches: int = 8, seed: int = 0) -> View:
    """patches x patches squares in random order; as many as there are pixels makes it a shuffle of pixels.

    Raises ValueError at use unless patches divides the side.
    """
    places = torch.randperm(patches**2, generator=torch.Generator().manual_seed(seed))

    def rearrange(grid: Tensor) -> Tensor:
        side = len(grid) // patches
        if side * patches != len(grid):
            raise ValueError(f"{patches} patches do not fit {len(grid)} pixels evenly; choose one of their divisors")
        cut = grid.view(patches, side, patches, side).transpose(1, 2).flatten(0, 1)  # (patches^2, side, side)
        return cut[places].view(patches, patches, side, side).transpose(1, 2).reshape(grid.shape)

    return permutation(f"patch_permute:{patches}", rearrange)


def inner_circle() -> View:
    """A disc of radius 3/8 of the side is turned upside down, the rest stays."""
    return permutation("inner_circle", lambda grid: torch.where(_disc(len(grid)), grid.rot90(2), grid), _centre)


def square_hinge() -> View:
    """A board of 3x3 squares, each turned by a quarter, neighbours in opposite directions; left-over pixels stay."""

    def squares(size: int) -> list[tuple[slice, slice, int]]:
        s = size // 3
        cuts = [slice(i * s, (i + 1) * s) for i in range(3)]
        return [(cuts[i], cuts[j], -1 if (i + j) % 2 == 0 else 1) for i in range(3) for j in range(3)]

    def rearrange(grid: Tensor) -> Tensor:
        grid = grid.clone()
        for rows, columns, quarter in squares(len(grid)):
            grid[rows, columns] = grid[rows, columns].rot90(quarter)
        return grid

    def turns(size: int) -> Tensor:
        centres = positions(size).view(size, size, 2).clone()
        for rows, columns, _ in squares(size):
            centres[rows, columns] = torch.tensor([rows.start + rows.stop - 1, columns.start + columns.stop - 1]) / 2
        return centres.view(-1, 2)

    return permutation("square_hinge", rearrange, turns)


def jigsaw(seed: int = JIGSAW_SEED) -> View:
    """A puzzle of 4x4 pieces: corners, borders and inner pieces change places with their like (`jigsaw.py`)."""
    return permutation(f"jigsaw:{seed}", lambda grid: torch.from_numpy(puzzle.order(len(grid), seed)))


# ---------------------------------------------------------------------------------------------- views that fail


def inner_circle_failure() -> View:
    """The disc turned by 135 degrees: between pixels values must be mixed, which blurs noise."""

    def turned(x: Tensor, angle: float) -> Tensor:
        from torchvision.transforms.functional import InterpolationMode, rotate  # takes a second, and only used here

        flat = x.reshape(-1, *x.shape[-3:])
        inside = rotate(flat, angle, InterpolationMode.BILINEAR).view(x.shape)
        return torch.where(_disc(side_of(x)).to(x.device), inside, x)

    def back(x: Tensor) -> Tensor:
        return turned(x, -135)

    return View("inner_circle_failure", lambda x: turned(x, 135), back, back)


def blur_failure(factor: int = 8) -> View:
    """Shrunk and enlarged again by factor, which cannot be undone; the inverse does nothing."""

    def view(x: Tensor) -> Tensor:
        flat = x.reshape(-1, *x.shape[-3:])
        small = F.interpolate(flat, scale_factor=1 / factor, mode="bilinear", antialias=True)
        return F.interpolate(small, x.shape[-2:], mode="bilinear").view(x.shape)

    return View("blur_failure", view, lambda x: x, lambda x: x)


def white_balance_failure(factor: float = 1.5) -> View:
    """Brighter by factor: linear and easily undone, but it makes noise stronger than its time says."""
    return View("white_balance_failure", lambda x: x * factor, lambda x: x / factor, lambda x: x)


def _centre(size: int) -> Tensor:
    return torch.full((size * size, 2), (size - 1) / 2)


VIEWS: dict[str, Callable[..., View]] = {
    "identity": lambda: permutation("identity", lambda g: g),
    "flip": lambda: permutation("flip", lambda g: g.flip(0)),
    "rotate_180": lambda: permutation("rotate_180", lambda g: g.rot90(2), _centre),
    "rotate_cw": lambda: permutation("rotate_cw", lambda g: g.rot90(-1), _centre),
    "rotate_ccw": lambda: permutation("rotate_ccw", lambda g: g.rot90(1), _centre),
    "pixel_permute": lambda: patch_permute(64),
}
VIEWS |= {view.__name__: view for view in (
    negate, skew, skew_by, patch_permute, jigsaw, inner_circle, square_hinge,
    inner_circle_failure, blur_failure, white_balance_failure,
)}  # fmt: skip
NUMBERS = {  # what may stand behind the colon: its type, and from where to where
    "skew": (float, -64, 64),
    "skew_by": (float, -64, 64),
    "patch_permute": (int, 1, 64),
    "jigsaw": (int, 0, 2**32 - 1),
}
IDENTITY = VIEWS["identity"]()


def named(text: str | View) -> View:
    """The view called `text`: a name of VIEWS, with its number behind a colon where it has one (`skew:1.5`).

    A view stays as it is.    Raises ValueError that lists the names, or says what number it takes.
    """
    if isinstance(text, View):
        return text
    name, _, number = str(text).partition(":")
    if name not in VIEWS:
        raise ValueError(f"no view {name!r}; choose from {', '.join(VIEWS)}")
    if not number:
        return VIEWS[name]()
    if name not in NUMBERS:
        raise ValueError(f"{text!r}: {name} takes no number; those that do: {', '.join(NUMBERS)}")
    kind, low, high = NUMBERS[name]
    try:
        value = kind(number)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{text!r}: {name} takes {what} from {low} to {high}, such as {VIEWS[name]().name}")
    return VIEWS[name](value)


class Measure(NamedTuple):
    """One thing that `check` measures of a view."""

    name: str
    value: float
    ideal: float
    bound: float  # how far from ideal the value of a good view may lie
    otherwise: str  # what follows if it lies further

    @property
    def fault(self) -> str:
        """What is wrong, in a sentence; empty if nothing is."""
        good = abs(self.value - self.ideal) <= self.bound  # NaN is not
        return "" if good else f"{self.name} is {self.value:.3g}, not {self.ideal:g}: {self.otherwise}"


@torch.inference_mode()
def check(view: View | str, size: int = 64) -> list[Measure]:
    """Measure whether a view is linear and orthogonal, treats two images in 6 channels alike, and shows the same at
    four times the size.

    Statistics are over 64 noise images of 3 channels; their bound is five standard errors.
    Source: the conditions of the Visual Anagrams paper.
    """
    view, generator = named(view), torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 64, 3, size, size, generator=generator, dtype=torch.float64)
    vx, vy = view.view(x), view.view(y)
    before, after = (torch.cat(pair).flatten(1) for pair in ((x, y), (vx, vy)))
    products = (after @ after.T - before @ before.T).abs().max() / before.shape[1]
    std, few = vx.std(), 5 / math.sqrt(x.numel())
    down, right = (vx[..., 1:, :] * vx[..., :-1, :]).mean(), (vx[..., 1:] * vx[..., :-1]).mean()
    rows = [
        ("the inverse error", (view.inverse_view(vx) - x).abs().max(), 0, 1e-6, "what the network sees is lost"),
        ("the linearity error", (view.view(0.3 * x - 1.7 * y) - (0.3 * vx - 1.7 * vy)).abs().max(), 0, 1e-6,
         "image and noise cannot be viewed apart"),
        ("the error with 6 channels", (view.view(torch.cat([x, y], 1)) - torch.cat([vx, vy], 1)).abs().max(), 0, 1e-6,
         "stage 2, which sees x_t beside the low-resolution image, would mix the two"),
        ("the error of scalar products", products, 0, 1e-6, "not orthogonal: noise is not plain noise any more"),
        ("the deviation of noise", std, 1, few / math.sqrt(2), "the network reads a time that does not fit"),
        ("the correlation of neighbours", max(down, right, key=abs) / std**2, 0, few,
         "the network takes this noise for an image"),
        (f"the error at {4 * size} pixels", _enlarging_error(view, size, generator), 0, 0.3,
         "stage 2 would see another image"),  # rounding along the borders of pieces gives up to 0.18
    ]  # fmt: skip
    return [Measure(name, value.item(), *rest) for name, value, *rest in rows]


def _enlarging_error(view: View, size: int, generator: torch.Generator) -> Tensor:
    """How far a smooth image, enlarged, viewed and shrunk again, is from its view: rms over the image's deviation."""
    smooth = F.interpolate(torch.randn(1, 3, 5, 5, generator=generator), size, mode="bicubic", align_corners=True)
    enlarged = F.interpolate(smooth, 4 * size, mode="bilinear", align_corners=True)
    difference = F.avg_pool2d(view.view(enlarged), 4) - view.view(smooth)
    return difference.square().mean().sqrt() / smooth.std()


def positions(size: int) -> Tensor:
    """(size^2, 2): y and x of every pixel."""
    side = torch.arange(size, dtype=torch.float32)
    return torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1).view(-1, 2)


def _disc(size: int) -> Tensor:
    yx = positions(size).view(size, size, 2) - (size - 1) / 2
    return yx.square().sum(-1) < (3 / 8 * size) ** 2


def side_of(x: Tensor) -> int:
    if x.ndim < 3 or x.shape[-1] != x.shape[-2]:
        raise ValueError(f"views need square images (..., C, H, H), got {tuple(x.shape)}")
    return x.shape[-1]
