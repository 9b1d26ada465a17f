"""Editing a given picture: where the walk starts, and what of it is kept.

Read `sampling.py` first. Of its three places to intervene, `factorized.py` used the first, what is predicted. These are
the other two, and all three combine.

    SDEdit       start from the picture noised to a middle time: coarse things stay, details are drawn anew
    inpainting   after every step put the known region back, so that only the masked one is new:

        x_prev = mask * x_prev + (1 - mask) * known(t_prev)          mask: 1 = paint here, 0 = keep

        renoise   known is the picture noised to t_prev, drawn anew each time           the course's way, RePaint's
        clean     known is the picture itself, however noisy the rest still is          DeepFloyd IF's, diffusers'
        repaint   renoise, with `jumps` back up in the walk so that both regions agree

    reference    the same, for a component instead of a region: coarse shapes of a photograph, say, with new details

Source: SDEdit Alg. 1 (`sampling.noised` starts it); RePaint Eq. 8, as in diffusers'
schedulers/scheduling_repaint.py@v0.42.1 (their mask is 1 where we have 0); the Factorized Diffusion paper.
Next: the plumbing, `checkpoint.py`, `images.py`; or straight on to `deepfloyd/tokenizer.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minidiff.components import Component, blur
from minidiff.sampling import noised
from minidiff.schedule import Schedule

Keep = Callable[[Tensor, int], Tensor]
METHODS = ("renoise", "clean", "repaint")
JUMPS = (10, 3)  # jump_length and jump_n_sample, for some 30 steps; RePaint has 10 and 10 for 250


def renoise(picture: Tensor, mask: Tensor, schedule: Schedule, generators: Sequence[torch.Generator]) -> Keep:
    """Keep the picture outside the mask, as noisy as the rest: a `keep` for `sampling.denoise`.

    picture: (1, C, H, W) in [-1, 1].  mask: (1, 1, H, W) in [0, 1], 1 = paint here; values between feather the seam.
    generators: one per picture, not those of the loop, so that a mask of ones changes nothing.
    Noised to the *new* time; after the last step the known region is the picture itself.
    Raises ValueError if mask and picture do not fit.    Source: RePaint Eq. 8.
    """
    check_mask(mask, picture)

    def keep(x_prev: Tensor, t_prev: int) -> Tensor:
        known = noised(picture.to(x_prev), t_prev, schedule, generators)
        m = mask.to(x_prev)
        return m * x_prev + (1 - m) * known

    return keep


def clean(picture: Tensor, mask: Tensor) -> Keep:
    """Keep the picture outside the mask as it is, at every time. Arguments and errors as for `renoise`.

    Source: deep-floyd/IF deepfloyd_if/model/gaussian_diffusion.py@ffc8163; diffusers' IFInpaintingPipeline.
    """
    check_mask(mask, picture)

    def keep(x_prev: Tensor, t_prev: int) -> Tensor:
        m = mask.to(x_prev)
        return m * x_prev + (1 - m) * picture.to(x_prev)

    return keep


def reference(picture: Tensor, component: Component, schedule: Schedule, generators: Sequence[torch.Generator]) -> Keep:
    """Keep one component of a picture, and let the rest be drawn: solves the inverse problem "what has this component?"

        x_prev = x_prev - C(x_prev) + C(picture noised to t_prev)

    picture: (1, 3, H, W) in [-1, 1].    Source: the inverse problems of the Factorized Diffusion paper.
    """

    def keep(x_prev: Tensor, t_prev: int) -> Tensor:
        known = noised(picture.to(x_prev), t_prev, schedule, generators)
        return x_prev - component(x_prev) + component(known)

    return keep


def box(corners: Sequence[float], size: int) -> Tensor:
    """A mask that is 1 in a rectangle: (1, 1, size, size).  corners: x0 y0 x1 y1, in pixels of 64, lower end excluded.

    Raises ValueError unless 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64.
    """
    x0, y0, x1, y1 = corners
    if not (0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64):
        raise ValueError(f"a box is x0 y0 x1 y1 with 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64, got {list(corners)}")
    mask = torch.zeros(1, 1, size, size)
    x0, y0, x1, y1 = (round(c * size / 64) for c in corners)
    mask[..., y0:y1, x0:x1] = 1
    return mask


def feather(mask: Tensor, width: float) -> Tensor:
    """Soften the seam of a mask: a blur of that many pixels of 64 (its sigma); 0 leaves it hard.

    Raises ValueError unless 0 <= width <= 20.
    """
    if not 0 <= width <= 20:
        raise ValueError(f"the feather's width must lie in 0..20 pixels, got {width:g}")
    return blur(mask, width, kernel=2 * int(3 * width) + 3).clamp(0, 1) if width else mask


def check_mask(mask: Tensor, picture: Tensor) -> None:
    """Raise ValueError unless mask is (1, 1, H, W) in [0, 1], with the picture's H and W."""
    if mask.ndim != 4 or mask.shape[:2] != (1, 1) or mask.shape[2:] != picture.shape[2:]:
        raise ValueError(
            f"the mask must be (1, 1, {picture.shape[2]}, {picture.shape[3]}) like its picture, got {tuple(mask.shape)}"
        )
    if mask.min() < 0 or mask.max() > 1:
        raise ValueError(
            f"a mask lies in [0, 1], 1 where new content goes, got {mask.min().item():g} to {mask.max().item():g}; "
            "a mask of another convention (-1 and 1, or 1 = keep) must be converted first"
        )
