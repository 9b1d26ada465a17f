"""Components: the part of an image that one prompt decides, such as its coarse shapes, or its colours.

Read `views.py` first. A view changes what the network sees; a component leaves that alone and takes a part of what the
network says. Components that add up to the whole divide an image among prompts: coarse shapes from one and details
from another make a hybrid image, which changes with the distance it is seen from.

    frequency   low_pass + high_pass          near and far
    triple      three bands                   three distances
    color       grey + colour                 without and with colour
    motion      blurred diagonally + rest     moving and still
    scale       a + (1 - a)                   weights: composition, negation, guidance itself

All are linear, on (..., 3, H, W), and reach equally far in an image whatever its size: kernels and widths are given
for 64 pixels and grow with H.

Source: the Factorized Diffusion paper; numbers checked against dangeng/visual_anagrams
visual_anagrams/views/view_hybrid.py@75c092e.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.checks import chosen, number

Component = Callable[[Tensor], Tensor]

SIGMA, KERNEL = 2.0, 33  # of the low pass, in pixels of 64
MIDDLE_SIGMA = 1.0  # of the triple's finer cut
MOTION_KERNEL = 7


def whole(x: Tensor) -> Tensor:
    """Everything."""
    return x


def blur(x: Tensor, sigma: float = SIGMA, kernel: int = KERNEL) -> Tensor:
    """Gaussian blur with reflected borders: torchvision's, but by rows and columns, as wide kernels are slow otherwise.

    sigma, kernel: in pixels of 64, scaled with the height, the kernel kept odd.

    x: (..., C, H, W), larger than half the kernel. sigma 0 is no blur. Raises ValueError if the image is too small,
    sigma negative or kernel below 1.
    """
    number("a blur's sigma", sigma, 0)
    number("a blur's kernel", kernel, 1, whole=True)
    factor = x.shape[-2] / 64
    taps = int(kernel * factor)
    taps += (taps + 1) % 2
    if sigma == 0:
        return x
    if taps // 2 >= min(x.shape[-2:]):
        raise ValueError(f"an image of {tuple(x.shape[-2:])} pixels is too small for a blur with {taps} taps")
    offset = torch.arange(taps, dtype=x.dtype, device=x.device) - taps // 2
    weight = (-0.5 * (offset / (sigma * factor)).square()).exp()
    weight = (weight / weight.sum()).view(1, 1, 1, taps)
    flat, pad = x.reshape(-1, 1, *x.shape[-2:]), taps // 2
    flat = F.conv2d(F.pad(flat, (pad, pad, 0, 0), mode="reflect"), weight)  # along rows, then along columns
    return F.conv2d(F.pad(flat, (0, 0, pad, pad), mode="reflect"), weight.transpose(2, 3)).view(x.shape)


def low_pass(sigma: float = SIGMA) -> Component:
    """What is left after a blur."""
    return lambda x: blur(x, sigma)


def high_pass(sigma: float = SIGMA) -> Component:
    """What a blur takes away."""
    return lambda x: x - blur(x, sigma)


def triple(sigma: float = SIGMA) -> list[Component]:
    """[coarse, middle, fine]: blur with MIDDLE_SIGMA, then what is left once more with sigma."""
    middle, coarse = low_pass(MIDDLE_SIGMA), low_pass(sigma)
    return [lambda x: coarse(middle(x)), lambda x: middle(x) - coarse(middle(x)), high_pass(MIDDLE_SIGMA)]


def grey(x: Tensor) -> Tensor:
    """The mean over the colours, in each of them: an orthogonal projection."""
    return x.mean(-3, keepdim=True).expand_as(x)


def color(x: Tensor) -> Tensor:
    """What grey leaves out."""
    return x - grey(x)


def motion(x: Tensor) -> Tensor:
    """Blurred along the diagonal, as if moved from the upper left to the lower right; zeros beyond the border."""
    factor = x.shape[-2] / 64
    taps = max(int(MOTION_KERNEL * factor), 1)
    taps += (taps + 1) % 2
    weight = (torch.eye(taps, dtype=x.dtype, device=x.device) / taps).expand(x.shape[-3], 1, taps, taps)
    return F.conv2d(x.reshape(-1, *x.shape[-3:]), weight, padding=taps // 2, groups=x.shape[-3]).view(x.shape)


def scaled(weight: float) -> Component:
    """A share of everything; negative to lead away."""
    return lambda x: weight * x


def of_kind(kind: str, sigma: float = SIGMA, weights: list[float] | None = None) -> list[Component]:
    """The components of a kind of the table above, in the order of the prompts.

        C_1(x) + ... + C_K(x) = x              for every kind but scale, whose weights need not add up to 1

    Raises ValueError with the list of the kinds if there is none such.    Source: Factorized Diffusion.
    """
    if kind == "scale" and not weights:
        raise ValueError("scale needs one weight per prompt, such as --weights 0.5 0.5")
    for weight in weights or ():
        number("a weight", weight)
    kinds = {
        "frequency": [low_pass(sigma), high_pass(sigma)],
        "triple": triple(sigma),
        "color": [grey, color],
        "motion": [motion, lambda x: x - motion(x)],
        "scale": [scaled(weight) for weight in weights or ()],
    }
    return chosen("kind of components", kind, kinds)
