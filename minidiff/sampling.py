"""The one denoising loop: from noise to picture, step by step.

Read `ddpm.py` first. A prediction is any callable

    predict(x_t, t) -> (eps, pred_var or None)        x_t: (B, C, H, W) float32, t: (B,) int64

and the loop asks it once per step. There are three places to intervene, and they combine:

    what is predicted     wrap the callable                    guidance, anagrams, hybrids
    where we start        another x_t, later timesteps         SDEdit
    what we keep          `keep`, applied after every step     inpainting

Time only falls, unless `jumps` sends the walk back up a few times so that what is kept and what is new can settle.

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
    jumps: tuple[int, int] | None = None,
    on_step: Callable[[int, int, Tensor, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Walk x_t down the timesteps and return the picture: (B, C, H, W) float32.

    x_t: noisy as at timesteps[0].  timesteps: (S,) int64, descending; the next time is always the next entry.
    generators: one per picture, on the CPU, so that a seed gives one picture whatever the batch and the device.
    fix_x_start: clips or thresholds each estimate.  keep(x_prev, t_prev) -> x_prev, with t_prev = -1 after the last.
    final_step: False stops at timesteps[-1], still slightly noisy, without asking the network there.
    jumps: (jump_length, jump_n_sample), RePaint's resampling; see `visits`.
    on_step(i, t, x_t, pred_x_start, eps) watches; it must not change its tensors.
    Raises ValueError if timesteps do not descend or generators do not match the batch.    Source: DDPM Alg. 2.
    """
    check_timesteps(timesteps, schedule.num_train_timesteps)
    B = len(x_t)
    if len(generators) != B:
        raise ValueError(f"need one generator per picture: {B} pictures, {len(generators)} generators")
    x_t = x_t.float()
    times = visits(timesteps, final_step, jumps)
    i = 0
    for t, t_next in zip(times, times[1:]):
        t_batch = torch.full((B,), t, device=x_t.device)
        t_next_batch = torch.full_like(t_batch, t_next)
        noise = draw_noise(x_t.shape, generators).to(x_t.device) if t_next >= 0 else torch.zeros_like(x_t)
        if t_next > t:  # back up
            x_next = ddpm.add_more_noise(schedule, x_t, t_batch, t_next_batch, noise)
        else:
            eps, pred_var = predict(x_t, t_batch)
            eps, pred_var = eps.float(), None if pred_var is None else pred_var.float()
            x_next, x_start = ddpm.step(schedule, x_t, t_batch, t_next_batch, eps, pred_var, noise, fix_x_start)
            if on_step is not None:
                on_step(i, t, x_t, x_start, eps)
            i += 1
        x_t = x_next if keep is None else keep(x_next, t_next)
    return x_t


@torch.inference_mode()
def one_step(predict: Prediction, x_t: Tensor, t: int, schedule: Schedule) -> Tensor:
    """The clean picture as one look at x_t (B, C, H, W) suggests it, not clipped.    Source: DDPM Eq. 15."""
    t_batch = torch.full((len(x_t),), t, device=x_t.device)
    eps, _ = predict(x_t, t_batch)
    return ddpm.predict_x_start(x_t, eps.float(), schedule.alpha_bar(t_batch))


def visits(timesteps: Tensor, final_step: bool = True, jumps: tuple[int, int] | None = None) -> list[int]:
    """All times that the loop comes to, in order: timesteps, then -1 (clean) if there is a final step.

    jumps: (jump_length, jump_n_sample). On its way down, at every jump_length-th entry counted from the end, the walk
    goes jump_length entries back up and comes down again, until it has left that place jump_n_sample times. 1 is no
    jump at all. Raises ValueError if either is below 1.
    Source: the RePaint paper's resampling; checked against andreas128/RePaint guided_diffusion/scheduler.py@0fea066.
    """
    down = timesteps.tolist()
    if jumps is None:
        return down + ([-1] if final_step else [])
    jump_length, jump_n_sample = jumps
    if jump_length < 1 or jump_n_sample < 1:
        raise ValueError(
            f"jumps need a length and a number of samples of at least 1, got {jump_length}, {jump_n_sample}"
        )
    left = {j: jump_n_sample - 1 for j in range(0, len(down) - jump_length, jump_length)}  # jumps yet to make
    times, k = [], len(down)  # k counts entries from the end
    while k > 0:
        k -= 1
        times.append(down[-1 - k])
        if left.get(k, 0):
            left[k] -= 1
            for _ in range(jump_length):
                k += 1
                times.append(down[-1 - k])
    return times + ([-1] if final_step else [])


def network_calls(times: list[int]) -> int:
    """How often the loop asks the network on this walk: once for every step down."""
    return sum(t_next < t for t, t_next in zip(times, times[1:]))


def noised(x_start: Tensor, t: int, schedule: Schedule, generators: Sequence[torch.Generator]) -> Tensor:
    """Pictures as they are at time t (-1: clean), one for each generator: where SDEdit starts.

    x_start: (B, C, H, W), or (1, C, H, W) for all alike, in [-1, 1].  Source: DDPM Eq. 4.
    """
    x_start = x_start.expand(len(generators), -1, -1, -1)
    if t < 0:
        return x_start
    noise = draw_noise(x_start.shape, generators).to(x_start.device)
    return ddpm.add_noise(x_start, noise, schedule.alpha_bar(torch.tensor([t])))


def draw_noise(shape: torch.Size | tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
    """Gaussian noise (B, C, H, W) float32 on the CPU, each picture's from its own generator."""
    return torch.cat([torch.randn((1, *shape[1:]), generator=g) for g in generators])


def seeded(seed: int, num_images: int, stream: int = 0) -> list[torch.Generator]:
    """Generators for num_images pictures, seeded seed, seed + 1, ...: picture i is what seed + i alone would give.

    stream: another number, another independent row of random numbers for the same seeds. It moves the seed far away
    within 32 bits, all that torch's CPU generator takes of a seed.
    """
    far = stream * 0x9E3779B1  # the golden ratio of 2^32: multiples of it never come near each other
    return [torch.Generator().manual_seed((seed + i + far) % 2**32) for i in range(num_images)]
