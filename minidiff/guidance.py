"""Classifier-free guidance, which makes eps obey the prompt, and dynamic thresholding, which keeps estimates in range.

Read `sampling.py` first. A *model* here is a network that is still waiting for its text:

    model(x_t, t, prompt_embeds) -> (eps, pred_var or None)

and `guided` gives it the text and makes it a prediction.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from minidiff.checks import number
from minidiff.sampling import Prediction

Model = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
Scale = float | Callable[[Tensor, Tensor], Tensor]  # of `combine`, or another rule: (eps_uncond, eps_cond) -> eps


def combine(eps_uncond: Tensor, eps_cond: Tensor, guidance_scale: float) -> Tensor:
    """Go from the unconditional prediction towards the conditional one, and beyond it.

        eps = eps_uncond + guidance_scale * (eps_cond - eps_uncond)

    1 is no guidance, 0 ignores the prompt. The CFG paper's w is guidance_scale - 1: (1 + w) cond - w uncond.
    Source: Imagen Eq. 2.
    """
    return eps_uncond + guidance_scale * (eps_cond - eps_uncond)


def guided(
    model: Model, prompt_embeds: Tensor, negative_prompt_embeds: Tensor, guidance_scale: Scale,
    split_batch: bool = False,
) -> Prediction:  # fmt: skip
    """Give a model its text: a prediction with classifier-free guidance.

    prompt_embeds, negative_prompt_embeds: (B, L, D), or (1, L, D) for all images alike. The negative one encodes what
    is to be avoided, by default the empty prompt, whose states are not zeros.
    Both go through the network as one batch, unconditional first; split_batch makes two calls with half the memory.
    pred_var is the conditional one's. With guidance_scale 1 the unconditional branch is not computed at all. With 0 the
    conditional one is not, and the prompt has no say, not even in pred_var.
    A function in place of guidance_scale is another rule (walkthrough, chapter 4). It gets both branches, each
    (N, C, H, W), where N counts images, or images times the parts of `factorized.py`, and must treat each alone.
    Raises ValueError as `check_scale`.
    """
    check_scale(guidance_scale)
    mix = guidance_scale if callable(guidance_scale) else functools.partial(combine, guidance_scale=guidance_scale)

    def predict(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        cond = prompt_embeds.to(x_t.device).expand(len(x_t), -1, -1)
        if guidance_scale == 1:
            return model(x_t, t, cond)
        uncond = negative_prompt_embeds.to(x_t.device).expand(len(x_t), -1, -1)
        if guidance_scale == 0:
            return model(x_t, t, uncond)
        if split_batch:
            (eps_uncond, _), (eps_cond, pred_var) = model(x_t, t, uncond), model(x_t, t, cond)
        else:
            eps, pred_var = model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([uncond, cond]))
            eps_uncond, eps_cond = eps.chunk(2)
            pred_var = None if pred_var is None else pred_var.chunk(2)[1]
        return mix(eps_uncond, eps_cond), pred_var

    return predict


def check_scale(guidance_scale: object) -> None:
    """Raise ValueError unless this is a finite number or a function."""
    if not callable(guidance_scale):
        number("guidance_scale", guidance_scale)


def dynamic_threshold(ratio: float = 0.95, max_value: float = 1.5) -> Callable[[Tensor], Tensor]:
    """Keep each estimate in range without flattening its colours: a `fix_x_start` for `sampling.denoise`.

        s = clamp(quantile(|x_start|, ratio), 1, max_value)        over all values of one image
        x_start = clamp(x_start, -s, s) / s

    ratio: in (0, 1].  max_value: 1.5 in IF's stage 1; 1.0 in stage 2, where it is a plain clamp to [-1, 1].
    Raises ValueError if either is out of range.    Source: Imagen Sec. 2.3; the cap is IF's.
    """
    if not (0 < ratio <= 1 and max_value >= 1):
        raise ValueError(f"need 0 < ratio <= 1 and max_value >= 1, got {ratio} and {max_value}")

    def fix_x_start(x_start: Tensor) -> Tensor:
        if x_start.ndim != 4:
            raise ValueError(f"estimates must be (B, C, H, W), got {tuple(x_start.shape)}")
        values = x_start.float()
        s = quantile(values.abs().flatten(1), ratio).clamp(1, max_value).view(-1, 1, 1, 1)
        return (values.clamp(-s, s) / s).to(x_start.dtype)

    return fix_x_start


def quantile(x: Tensor, ratio: float) -> Tensor:
    """Row quantiles with linear interpolation: (B, N) -> (B,). torch.quantile refuses rows of 16 million values."""
    position = ratio * (x.shape[1] - 1)
    low, part = int(position), position - int(position)
    ordered = x.sort(dim=1).values
    below, above = ordered[:, low], ordered[:, min(low + 1, x.shape[1] - 1)]
    return torch.lerp(below, above, part)
