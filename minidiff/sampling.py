"""The one denoising loop: from noise to picture, step by step.

Read `ddpm.py` first. A prediction is any callable

    predict(x_t, t) -> (eps, pred_var or None)        x_t: (B, C, H, W) float32, t: (B,) int64

and the loop asks it once per step. There are three places to intervene, and they combine:

    what is predicted     wrap the callable                    guidance, anagrams, hybrids
    where we start        another x_t, later timesteps         SDEdit
    what we keep          `keep`, applied after every step     inpainting

Next: `guidance.py`, the first wrapper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minidiff import ddpm
from minidiff.schedule import Schedule, check_timesteps

Prediction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


@torch.inference_mode()
def denoise(
    predict: Prediction,
    x_t: Tensor,
    timesteps: Tensor,
    schedule: Schedule,
    *,
    generators: Sequence[torch.Generator],
    fix_x_start: Callable[[Tensor], Tensor] | None = None,
    keep: Callable[[Tensor, int], Tensor] | None = None,
    final_step: bool = True,
    on_step: Callable[[int, int, Tensor, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Walk x_t down the timesteps and return the picture: (B, C, H, W) float32.

    x_t: noisy as at timesteps[0].  timesteps: (S,) int64, descending; the next time is always the next entry.
    generators: one per picture, on the CPU, so that a seed gives one picture whatever the batch and the device.
    fix_x_start: clips or thresholds each estimate.  keep(x_prev, t_prev) -> x_prev, with t_prev = -1 after the last.
    final_step: False stops at timesteps[-1], still slightly noisy, without asking the network there.
    on_step(i, t, x_t, pred_x_start, eps) watches; it must not change its tensors.
    Raises ValueError if timesteps do not descend or generators do not match the batch.    Source: DDPM Alg. 2.
    """
    check_timesteps(timesteps, schedule.num_train_timesteps)
    B = len(x_t)
    if len(generators) != B:
        raise ValueError(f"need one generator per picture: {B} pictures, {len(generators)} generators")
    x_t = x_t.float()
    following = timesteps[1:].tolist() + ([-1] if final_step else [])
    for i, (t, t_prev) in enumerate(zip(timesteps.tolist(), following)):
        t_batch = torch.full((B,), t, device=x_t.device)
        eps, pred_var = predict(x_t, t_batch)
        eps, pred_var = eps.float(), None if pred_var is None else pred_var.float()
        noise = draw_noise(x_t.shape, generators).to(x_t.device) if t_prev >= 0 else torch.zeros_like(x_t)
        t_prev_batch = torch.full_like(t_batch, t_prev)
        x_prev, pred_x_start = ddpm.step(schedule, x_t, t_batch, t_prev_batch, eps, pred_var, noise, fix_x_start)
        if on_step is not None:
            on_step(i, t, x_t, pred_x_start, eps)
        x_t = x_prev if keep is None else keep(x_prev, t_prev)
    return x_t


def draw_noise(shape: torch.Size | tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
    """Gaussian noise (B, C, H, W) float32 on the CPU, each picture's from its own generator."""
    return torch.cat([torch.randn((1, *shape[1:]), generator=g) for g in generators])


def seeded(seed: int, num_images: int) -> list[torch.Generator]:
    """Generators for num_images pictures, seeded seed, seed + 1, ...: picture i is what seed + i alone would give."""
    return [torch.Generator().manual_seed(seed + i) for i in range(num_images)]
