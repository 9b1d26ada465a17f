"""Editing a given image: where the walk starts, and what of it is kept.

Read `sampling.py` first. Of its four places to intervene, `factorized.py` is about what is predicted, and `solvers.py`
about how a step goes. These are the other two, and all four combine.

    SDEdit       start from the image noised to a middle time: coarse things stay, details are drawn anew
    inpainting   after every step put the known region back, so that only the masked one is new:

        x_prev = mask * x_prev + (1 - mask) * known(t_prev)          mask: 1 = paint here, 0 = keep

        renoise   known is the image noised to t_prev, drawn anew each time           the course's way, RePaint's
        clean     known is the image itself, however noisy the rest still is          DeepFloyd IF's, diffusers'
        repaint   renoise, with `jumps` back up in the walk so that both regions agree

    reference    the same, for a component instead of a region: coarse shapes of a photograph, say, with new details

Source: SDEdit Alg. 1 (`sampling.noised` starts it); RePaint Eq. 8, as in diffusers'
schedulers/scheduling_repaint.py@v0.42.1 (their mask is 1 where we have 0); the Factorized Diffusion paper.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff import images
from minidiff.checks import number, short
from minidiff.components import Component, blur
from minidiff.sampling import Keep, noised
from minidiff.schedule import Schedule

KeepRule = Callable[[Schedule, Sequence[torch.Generator]], Keep]  # a Keep that waits for a stage and its random numbers
METHODS = ("renoise", "clean", "repaint")
JUMPS = (10, 3)  # jump_length and jump_n_sample, for 20 steps or more; RePaint has 10 and 10 for 250


def renoise(image: Tensor, mask: Tensor) -> KeepRule:
    """Keep the image outside the mask, as noisy as the rest.

        x_prev = mask * x_prev + (1 - mask) * (sqrt(alpha_bar_prev) image + sqrt(1 - alpha_bar_prev) noise)

    image: (1, C, H, W) in [-1, 1].  mask: (1, 1, H, W) in [0, 1], 1 = paint here; values between feather the seam.
    Noised to the *new* time; after the last step the known region is the image itself. Its noise must come from
    generators other than the loop's, so that a mask of ones changes nothing.
    Raises ValueError if mask and image do not fit.    Source: RePaint Eq. 8.
    """
    check_mask(mask, image)

    def rule(schedule: Schedule, generators: Sequence[torch.Generator]) -> Keep:
        return lambda x_prev, t_prev: _blend(x_prev, noised(image.to(x_prev), t_prev, schedule, generators), mask)

    return rule


def clean(image: Tensor, mask: Tensor) -> KeepRule:
    """Keep the image outside the mask as it is, at every time. Arguments and errors as for `renoise`.

    Source: deep-floyd/IF deepfloyd_if/model/gaussian_diffusion.py@ffc8163; diffusers' IFInpaintingPipeline.
    """
    check_mask(mask, image)
    return lambda schedule, generators: lambda x_prev, t_prev: _blend(x_prev, image.to(x_prev), mask)


def _blend(new: Tensor, known: Tensor, mask: Tensor) -> Tensor:
    if new.shape[-2:] != mask.shape[-2:]:
        sizes = f"{tuple(mask.shape[-2:])} pixels, the walk {tuple(new.shape[-2:])}"
        raise ValueError(f"what is kept has {sizes}; make it for the stage that draws")
    mask = mask.to(new)
    return mask * new + (1 - mask) * known


def reference(image: Tensor, component: Component) -> KeepRule:
    """Keep one component of an image, and let the rest be drawn: solves the inverse problem "what has this component?"

        x_prev = x_prev - C(x_prev) + C(image noised to t_prev)

    image: (1, 3, H, W) in [-1, 1].    Source: Factorized Diffusion, its inverse problems.
    """

    def rule(schedule: Schedule, generators: Sequence[torch.Generator]) -> Keep:
        def keep(x_prev: Tensor, t_prev: int) -> Tensor:
            return x_prev - component(x_prev) + component(noised(image.to(x_prev), t_prev, schedule, generators))

        return keep

    return rule


def kept(image: object, mask: object, size: int, method: str = "renoise", width: float = 0.0) -> KeepRule | None:
    """What a walk at this size keeps of an image: all that lies outside the mask. None if there is no mask.

    image: whatever `images.load` reads.  mask: an image file, a tensor (1, 1, H, H), or four numbers as for `box`.
    method: one of METHODS.  width: as for `feather`.
    Raises ValueError if a mask comes without an image, or width without a mask; if a mask's file has another shape; or
    if the method is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; choose from {', '.join(METHODS)}")
    if mask is None:
        if width:
            raise ValueError("feather softens a mask; pass a mask or a box")
        return None
    if image is None:
        raise ValueError("a mask needs an image, of which the rest is kept")
    if isinstance(mask, (str, Path)):
        images.check_same_shape(image, mask)
    region = feather(mask_at(mask, size), width)
    for share, what in ((0, "nothing: nothing is painted"), (1, "everything: nothing of the image is kept")):
        if (region == share).all():
            warnings.warn(f"at {size} pixels the mask marks {what}", stacklevel=2)
    return (clean if method == "clean" else renoise)(images.load(image, size), region)


def jumps_for(steps: int, length: int | None = None, times: int | None = None) -> tuple[int, int]:
    """RePaint's jumps for a walk of so many steps: JUMPS, but no longer than half the walk, where nothing else is said.

    Raises ValueError unless length lies in 1..steps - 1 and times is at least 1.
    """
    length = min(JUMPS[0], max(steps // 2, 1)) if length is None else length
    times = JUMPS[1] if times is None else times
    number(f"jump_length for {steps} steps", length, 1, max(steps - 1, 1), whole=True)
    number("jump_n_sample", times, 1, whole=True)
    return length, times


def mask_at(mask: object, size: int) -> Tensor:
    """A mask at this size, (1, 1, size, size) in [0, 1]: of a file, a tensor (1, 1, H, H), or the corners of a box.

    Raises ValueError if a tensor has another shape; its numbers may be of any type.
    """
    if isinstance(mask, Tensor):
        if mask.ndim != 4 or mask.shape[:2] != (1, 1) or mask.shape[2] != mask.shape[3] or not mask.numel():
            raise ValueError(f"a mask's tensor must be (1, 1, H, H), a square, got {tuple(mask.shape)}")
        return F.interpolate(mask.float(), (size, size), mode="nearest")
    return images.load_mask(mask, size) if isinstance(mask, (str, Path)) else box(mask, size)


def box(corners: Sequence[float], size: int) -> Tensor:
    """A mask that is 1 in a rectangle: (1, 1, size, size).  corners: x0 y0 x1 y1, in pixels of 64, x1 and y1 excluded.

    Raises ValueError unless 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64.
    """
    if isinstance(corners, str) or not isinstance(corners, Sequence) or len(corners) != 4:
        raise ValueError("a mask is an image file, a tensor (1, 1, H, H), or four numbers x0 y0 x1 y1, got "
                         f"{short(corners)}")  # fmt: skip
    for corner in corners:
        number("a corner of a box", corner, 0, 64)
    x0, y0, x1, y1 = corners
    if not (x0 < x1 and y0 < y1) or max(x1, y1) <= 1:
        raise ValueError(f"a box is x0 y0 x1 y1, x0 < x1 and y0 < y1, in pixels of 64, got {list(corners)}")
    mask = torch.zeros(1, 1, size, size)
    x0, y0, x1, y1 = (round(c * size / 64) for c in corners)
    mask[..., y0:y1, x0:x1] = 1
    return mask


def feather(mask: Tensor, width: float) -> Tensor:
    """Soften the seam of a mask: a blur of that many pixels of 64 (its sigma); 0 leaves it hard.

    Raises ValueError unless 0 <= width <= 20.
    """
    number("feather", width, 0, 20)
    return blur(mask.float(), width, kernel=2 * int(3 * width) + 3).clamp(0, 1) if width else mask


def check_mask(mask: Tensor, image: Tensor) -> None:
    """Raise ValueError unless mask is (1, 1, H, W) in [0, 1], with the image's H and W, and the image in range."""
    images.in_range(image)
    if mask.ndim != 4 or mask.shape[:2] != (1, 1) or mask.shape[2:] != image.shape[2:]:
        H, W = image.shape[2:]
        raise ValueError(f"the mask must be (1, 1, {H}, {W}) like its image, got {tuple(mask.shape)}")
    if not 0 <= mask.min() <= mask.max() <= 1:  # NaN is not, either
        raise ValueError(f"a mask lies in [0, 1], 1 where new content goes, got {mask.min():g} to {mask.max():g}; "
                         "convert a mask of another convention (-1 and 1, or 1 = keep) first")  # fmt: skip
