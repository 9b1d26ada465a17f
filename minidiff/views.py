"""Optical views: turning, mirroring or shuffling a picture so that another one appears.

Read `sampling.py` first. An anagram denoises one picture as several: before the network looks, a *view* rearranges
x_t, and what the network says is rearranged back by the inverse. That only works if the view

    is linear, so that it may be applied to picture and noise apart:  V(a x + b noise) = a V x + b V noise
    is orthogonal, so that Gaussian noise stays Gaussian noise of the same strength:  V V^T = I

Every permutation of pixels qualifies, and so does the negative. `check` measures both, and says why a bad view is bad:

    python -m minidiff.anagram --check rotate_180
    python -m minidiff.anagram --check blur_failure

Source: the Visual Anagrams paper. Permutations checked against dangeng/visual_anagrams
visual_anagrams/views/permutations.py@1d06220; skew and the views that fail are built from their descriptions, and of
the jigsaw the moves are theirs, the outlines of the pieces our own.    Next: `components.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

JIGSAW_SEED = 4522


@dataclass(frozen=True)
class View:
    """A way to look at a picture, and the way back. All functions are pure, on (..., C, H, W).

    view: applied to what the network sees (in stage 2 also to its low-resolution picture).
    inverse_view: applied to its eps.  inverse_variance: to its pred_var, which moves with the pixels but has no sign.
    order: size -> (size^2,) int64, if the view is a permutation: pixel p of the view is pixel order[p] of the picture.
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

    def view(x: Tensor) -> Tensor:
        return x.flatten(-2)[..., order(side_of(x)).to(x.device)].view(x.shape)

    def inverse_view(x: Tensor) -> Tensor:
        return x.flatten(-2)[..., order(side_of(x)).argsort().to(x.device)].view(x.shape)

    return View(name, view, inverse_view, inverse_view, order, turns)


def negate() -> View:
    """Light and dark exchanged, in [-1, 1]: -x. The variance has no sign and stays."""
    return View("negate", torch.neg, torch.neg, lambda x: x)


def skew(factor: float = 1.5) -> View:
    """Column i moves down by int(factor (i - W/2)), and what leaves below comes in above."""

    def rearrange(grid: Tensor) -> Tensor:
        return _roll_columns(grid, [int(factor * (i - len(grid) // 2)) for i in range(len(grid))])

    return permutation(f"skew:{factor:g}", rearrange)


def skew_by(max_displacement: float = 50) -> View:
    """Columns move by up to max_displacement pixels of 64, evenly from up (left) to down (right)."""

    def rearrange(grid: Tensor) -> Tensor:
        d = max_displacement * len(grid) / 64
        return _roll_columns(grid, np.linspace(-d, d, len(grid)).round().astype(int).tolist())

    return permutation(f"skew_by:{max_displacement:g}", rearrange)


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

    def rearrange(grid: Tensor) -> Tensor:
        return torch.where(_disc(len(grid)), grid.rot90(2), grid)

    return permutation("inner_circle", rearrange, _centre)


def square_hinge() -> View:
    """A board of 3x3 squares, each turned by a quarter against its neighbours; left-over pixels stay."""

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
    """A puzzle of 4x4 pieces: corners, borders and inner pieces change places with their like, by quarter turns.

        c0 e0 f0 c1         the index counts quarter turns of the whole board, and e and f have the same outline, so
        f3 i0 i1 e1         that a border piece may also change place with its neighbour.
        e3 i3 i2 f1
        c3 f2 e2 c2

    Moves and random stream as in the published code.
    """
    random = np.random.RandomState(seed)
    turned = np.concatenate([random.permutation(4) for _ in range(4)])  # of c, i, e, f: the piece's index afterwards
    swapped = random.randint(2, size=4).astype(bool)  # do e and f of this side change places?

    def rearrange(grid: Tensor) -> Tensor:
        size = len(grid)
        piece = _pieces(size).flatten().numpy()
        yx = positions(size).numpy() - (size - 1) / 2
        quarters = (turned[piece] - piece) % 4  # a piece's number modulo 4 is its index
        for _ in range(3):
            y, x = np.where(quarters > 0, yx[:, 1], yx[:, 0]), np.where(quarters > 0, -yx[:, 0], yx[:, 1])
            yx, quarters = np.stack([y, x], 1), quarters - 1
        to = (yx + (size - 1) / 2).round().astype(int)
        there = _pieces(size).numpy()[to[:, 0], to[:, 1]]
        index, is_border = there % 4, there >= 8
        step = size // 4 * np.where(there >= 12, -1, 1) * np.where(index >= 2, -1, 1) * (is_border & swapped[index])
        to[:, 1] += np.where(index % 2 == 0, step, 0)
        to[:, 0] += np.where(index % 2 == 1, step, 0)
        return torch.from_numpy(to[:, 0] * size + to[:, 1]).view(size, size)

    return permutation(f"jigsaw:{seed}", rearrange)


def _pieces(size: int) -> Tensor:
    """The number of the piece that each pixel belongs to, (size, size): c 0-3, i 4-7, e 8-11, f 12-15."""
    if size % 4:
        raise ValueError(f"a jigsaw of 4x4 pieces needs a side divisible by 4, got {size}")
    layout = torch.tensor([[0, 8, 12, 1], [15, 4, 5, 9], [11, 7, 6, 13], [3, 14, 10, 2]])
    s = size // 4
    pieces = layout.repeat_interleave(s, 0).repeat_interleave(s, 1)
    # Each knob is a disc that one piece has across a border of its neighbour: (y, x) in pieces, of the first turn.
    knobs = [(0.5, 1.0 + KNOB, 0), (0.5, 2.0 + KNOB, 8), (0.5, 3.0 + KNOB, 12), (1.0 + KNOB, 1.5, 8),
             (1.0 + KNOB, 2.5, 12), (1.5, 2.0 + KNOB, 4)]  # fmt: skip
    yx = (positions(size) + 0.5).view(size, size, 2) / s
    for y, x, owner in knobs:
        for turn in range(4):
            disc = (yx[..., 0] - y).square() + (yx[..., 1] - x).square() < KNOB_RADIUS**2
            pieces[disc] = owner + turn
            y, x = x, 4 - y
    return pieces


KNOB, KNOB_RADIUS = 0.10, 0.17  # how far a knob's centre lies beyond the border, and its radius, in pieces


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


# ---------------------------------------------------------------------------------------------- by name


def _centre(size: int) -> Tensor:
    return torch.full((size * size, 2), (size - 1) / 2)


VIEWS: dict[str, Callable[..., View]] = {
    "identity": lambda: permutation("identity", lambda g: g),
    "flip": lambda: permutation("flip", lambda g: g.flip(0)),
    "rotate_180": lambda: permutation("rotate_180", lambda g: g.rot90(2), _centre),
    "rotate_cw": lambda: permutation("rotate_cw", lambda g: g.rot90(-1), _centre),
    "rotate_ccw": lambda: permutation("rotate_ccw", lambda g: g.rot90(1), _centre),
    "negate": negate,
    "skew": skew,
    "skew_by": skew_by,
    "patch_permute": patch_permute,
    "pixel_permute": lambda: patch_permute(64),
    "jigsaw": jigsaw,
    "inner_circle": inner_circle,
    "square_hinge": square_hinge,
    "inner_circle_failure": inner_circle_failure,
    "blur_failure": blur_failure,
    "white_balance_failure": white_balance_failure,
}
NUMBERS = {  # what may stand behind the colon: its type, and from where to where
    "skew": (float, -64, 64),
    "skew_by": (float, -64, 64),
    "patch_permute": (int, 1, 64),
    "jigsaw": (int, 0, 2**32 - 1),
}
IDENTITY = VIEWS["identity"]()


def named(text: str) -> View:
    """The view called `text`: a name of VIEWS, with its number behind a colon where it has one (`skew:1.5`).

    Raises ValueError that lists the names, or says what number it takes.
    """
    name, _, number = text.partition(":")
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
        value = None
    if value is None or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{text!r}: {name} takes {what} from {low} to {high}, such as {VIEWS[name]().name}")
    return VIEWS[name](value)


# ---------------------------------------------------------------------------------------------- the linter


@dataclass(frozen=True)
class Report:
    """What `check` measured of a view, and in `faults` one sentence for each condition it breaks."""

    name: str
    inverse_error: float  # largest |inverse(view(x)) - x| for x ~ N(0, I)
    linearity_error: float  # largest |V(a x + b y) - a V x - b V y|
    orthogonality_error: float  # largest deviation of a scalar product <V x, V y> from <x, y>, over |x| |y|
    noise_std: float  # of V(noise); 1 is right
    noise_correlation: float  # of neighbouring pixels of V(noise), the larger of both directions; 0 is right
    upsampling_error: float  # of a smooth picture enlarged, seen and shrunk again, from seen alone, over its spread
    faults: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        return not self.faults


@torch.inference_mode()
def check(view: View, size: int = 64) -> Report:
    """The view linter: measure what a view must be, at size and four times that.

    Statistics are over 64 noise pictures of 3 channels; a bound is five standard errors.
    Source: the conditions of the Visual Anagrams paper: linear, and A A^T = I.
    """
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 64, 3, size, size, generator=generator, dtype=torch.float64)
    vx, vy = view.view(x), view.view(y)
    n = x.numel()
    inverse_error = (view.inverse_view(vx) - x).abs().max().item()
    linearity_error = (view.view(0.3 * x - 1.7 * y) - (0.3 * vx - 1.7 * vy)).abs().max().item()
    products = [torch.cat([a, b]).flatten(1) @ torch.cat([a, b]).flatten(1).T for a, b in ((x, y), (vx, vy))]
    orthogonality_error = (products[1] - products[0]).abs().max().item() / (3 * size * size)
    std = vx.std().item()
    down, right = (vx[..., 1:, :] * vx[..., :-1, :]).mean(), (vx[..., 1:] * vx[..., :-1]).mean()
    correlation = max(down, right, key=abs).item() / std**2
    smooth = F.interpolate(torch.randn(1, 3, 5, 5, generator=generator), size, mode="bicubic", align_corners=True)
    enlarged = F.interpolate(smooth, 4 * size, mode="bilinear", align_corners=True)
    difference = F.avg_pool2d(view.view(enlarged), 4) - view.view(smooth)
    upsampling_error = (difference.square().mean().sqrt() / smooth.std()).item()

    faults = []
    if linearity_error > 1e-6:
        faults.append(f"not linear (error {linearity_error:.2g}): picture and noise cannot be viewed apart")
    if inverse_error > 1e-6:
        faults.append(f"its inverse does not lead back (error {inverse_error:.2g}): what the network sees is lost")
    if orthogonality_error > 1e-6:
        faults.append(f"not orthogonal (error {orthogonality_error:.2g}): noise does not stay plain Gaussian noise")
    if abs(std - 1) > 5 / math.sqrt(2 * n):
        faults.append(f"noise of strength 1 becomes {std:.3f}: the network is told a time that does not fit")
    if abs(correlation) > 5 / math.sqrt(n):
        faults.append(
            f"neighbouring pixels of its noise correlate ({correlation:.3f}): the network takes that for a picture"
        )
    if upsampling_error > UPSAMPLING_BOUND:
        faults.append(
            f"at {4 * size} pixels it does not do what it does at {size} (error {upsampling_error:.2f}): stage 2 would "
            "see another picture"
        )
    return Report(view.name, inverse_error, linearity_error, orthogonality_error, std, correlation, upsampling_error,
                  tuple(faults))  # fmt: skip


UPSAMPLING_BOUND = 0.3  # rounding along the borders of pieces gives up to 0.18


def positions(size: int) -> Tensor:
    """(size^2, 2): y and x of every pixel."""
    side = torch.arange(size, dtype=torch.float32)
    return torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1).view(-1, 2)


def _disc(size: int) -> Tensor:
    yx = positions(size).view(size, size, 2) - (size - 1) / 2
    return yx.square().sum(-1) < (3 / 8 * size) ** 2


def _roll_columns(grid: Tensor, shifts: list[int]) -> Tensor:
    return torch.stack([grid[:, i].roll(shift) for i, shift in enumerate(shifts)], dim=1)


def side_of(x: Tensor) -> int:
    if x.ndim < 3 or x.shape[-1] != x.shape[-2]:
        raise ValueError(f"views need square pictures (..., C, H, H), got {tuple(x.shape)}")
    return x.shape[-1]
