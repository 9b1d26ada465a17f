"""The one denoising loop: from noise to image, step by step.

Read `ddpm.py` and `solvers.py` first. A prediction is any callable

    predict(x_t, t) -> (eps, pred_var or None)        x_t: (B, C, H, W) float32, t: (B,) int64

and the loop asks it once per step. It is a generator of steps, so whoever wants to watch iterates:

    for step in denoise(predict, x_T, timesteps, schedule, generators):
        print(step.t, step.x_start.std())
    image = step.x_prev                                # or, without watching: final(denoise(...))

There are four places to intervene, and they combine:

    what is predicted     wrap the callable                        guidance, anagrams, hybrids
    how a step goes       another `step`                           DDPM, DDIM, DPM-Solver++
    where the walk starts another x_t, later timesteps             SDEdit
    what is kept          `keep`, applied after every step         inpainting

Time only falls, unless `jumps` sends the walk back up a few times so that what is kept and what is new can settle.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from minidiff import ddpm
from minidiff.checks import number
from minidiff.schedule import Schedule, check_timesteps

Prediction = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
Keep = Callable[[Tensor, int], Tensor]  # keep(x_prev, t_prev) -> x_prev, with t_prev = -1 after the last step


class Step(NamedTuple):
    """What one step did. The tensors are the loop's own, (B, C, H, W) float32: clone before changing them."""

    i: int  # 0, 1, 2, ... counts calls of the network
    t: int  # the time it left
    t_prev: int  # the time it went to, -1: clean
    x_t: Tensor
    eps: Tensor
    x_start: Tensor  # the estimate of the clean image, after fix_x_start
    x_prev: Tensor  # where it led, after keep


@torch.inference_mode()
def denoise(
    predict: Prediction, x_t: Tensor, timesteps: Tensor, schedule: Schedule, generators: Sequence[torch.Generator], *,
    step: Callable[..., tuple[Tensor, Tensor]] = ddpm.step, fix_x_start: Callable[[Tensor], Tensor] | None = None,
    keep: Keep | None = None, final_step: bool = True, jumps: tuple[int, int] | None = None,
) -> Iterator[Step]:  # fmt: skip
    """Walk x_t down the timesteps, one Step at a time; the last one's x_prev is the image.

    predict: see above.  x_t: (B, C, H, W), noisy as at timesteps[0].  timesteps: (S,) int64, descending.
    generators: one per image, on the CPU, so that a seed gives one noise whatever the batch and the device; or seeds.
    step: `ddpm.step`, `solvers.ddim_step` or `solvers.dpm_step`.  fix_x_start: clips or thresholds each estimate.
    keep: changes each x_prev, also on the way up.  jumps: (jump_length, jump_n_sample), RePaint's; see `visits`.
    final_step: False stops at timesteps[-1], still slightly noisy, without asking the network there.
    Raises ValueError, at the first step, if timesteps do not descend or generators do not match the batch.
    Source: DDPM Alg. 2.
    """
    check_timesteps(timesteps, schedule.num_train_timesteps)
    B, generators = len(x_t), seeded(generators)
    if len(generators) != B:
        raise ValueError(f"need one generator per image: {B} images, {len(generators)} generators")
    x_t, previous, i, times = x_t.float(), None, 0, visits(timesteps, final_step, jumps)
    for t, t_next in zip(times, times[1:]):
        t_batch = torch.full((B,), t, device=x_t.device)
        t_next_batch = torch.full_like(t_batch, t_next)
        noise = draw_noise(x_t.shape, generators).to(x_t.device) if t_next >= 0 else torch.zeros_like(x_t)
        if t_next > t:  # back up
            x_t, previous = ddpm.add_more_noise(schedule, x_t, t_batch, t_next_batch, noise), None
            x_t = x_t if keep is None else keep(x_t, t_next)
            continue
        eps, pred_var = predict(x_t, t_batch)
        eps, pred_var = eps.float(), None if pred_var is None else pred_var.float()
        x_prev, x_start = step(schedule, x_t, t_batch, t_next_batch, eps, pred_var, noise, fix_x_start, previous)
        x_prev = x_prev if keep is None else keep(x_prev, t_next)
        yield Step(i, t, t_next, x_t, eps, x_start, x_prev)
        x_t, previous, i = x_prev, (t_batch, x_start), i + 1


def final(steps: Iterable[Step]) -> Tensor:
    """Where a walk leads, (B, C, H, W). Raises ValueError if it has no step, or leads to NaN or infinity."""
    last = deque(steps, maxlen=1)
    if not last:
        raise ValueError("the walk has no step: a single timestep needs the final step")
    if not last[0].x_prev.isfinite().all():
        raise ValueError("the walk leads to NaN or infinity: its start, a prompt's states or the weights are not "
                         "finite, or half precision overflows; try --dtype float32")  # fmt: skip
    return last[0].x_prev


@torch.inference_mode()
def one_step(predict: Prediction, x_t: Tensor, t: int, schedule: Schedule) -> Tensor:
    """The clean image as one look at x_t (B, C, H, W) suggests it, not clipped.    Source: DDPM Eq. 15."""
    t_batch = torch.full((len(x_t),), t, device=x_t.device)
    eps, _ = predict(x_t, t_batch)
    return ddpm.predict_x_start(x_t, eps.float(), schedule.alpha_bar(t_batch))


def visits(timesteps: Tensor, final_step: bool = True, jumps: tuple[int, int] | None = None) -> list[int]:
    """All times that the loop comes to, in order: timesteps, then -1 (clean) if there is a final step.

    jumps: (jump_length, jump_n_sample). On its way down, at every jump_length-th entry counted from the end, the walk
    goes jump_length entries back up and comes down again, jump_n_sample - 1 times.
    Raises ValueError if either is below 1.
    Source: the RePaint paper's resampling; checked against andreas128/RePaint guided_diffusion/scheduler.py@0fea066.
    """
    down, (jump_length, jump_n_sample) = timesteps.tolist(), jumps or (1, 1)
    number("jump_length", jump_length, 1, whole=True)
    number("jump_n_sample", jump_n_sample, 1, whole=True)
    jumps_left = {j: jump_n_sample - 1 for j in range(0, len(down) - jump_length, jump_length)}  # at each place
    times, k = [], len(down)  # k counts entries from the end
    while k > 0:
        k -= 1
        times.append(down[-1 - k])
        if jumps_left.get(k, 0):
            jumps_left[k] -= 1
            for _ in range(jump_length):
                k += 1
                times.append(down[-1 - k])
    return times + ([-1] if final_step else [])


def network_calls(times: list[int]) -> int:
    """How often the loop asks the network on this walk: once for every step down."""
    return sum(t_next < t for t, t_next in zip(times, times[1:]))


def noised(x_start: Tensor, t: int, schedule: Schedule, generators: Sequence[torch.Generator]) -> Tensor:
    """Images as they are at time t (-1: clean), one for each generator: where SDEdit starts.

    x_start: (B, C, H, W), or (1, C, H, W) for all alike, in [-1, 1].  Source: DDPM Eq. 4.
    """
    generators = seeded(generators)
    x_start = x_start.expand(len(generators), -1, -1, -1)
    if t == -1:
        return x_start
    noise = draw_noise(x_start.shape, generators).to(x_start.device)
    return ddpm.add_noise(x_start, noise, schedule.alpha_bar(torch.tensor([t])))


def draw_noise(shape: torch.Size | tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
    """Gaussian noise (B, C, H, W) float32 on the CPU, each image's from its own generator."""
    return torch.cat([torch.randn((1, *shape[1:]), generator=g) for g in generators])


def seeded(seeds: Iterable[int | torch.Generator], stream: int = 0) -> list[torch.Generator]:
    """One generator for each seed, on the CPU. Image i is what its seed alone gives. A generator may stand for a seed.

    stream: another number is another, independent row of random numbers for the same seeds: those of
    seed + stream * 0x9E3779B1, in 32 bits, which are all that torch's CPU generator takes of a seed.
    Raises ValueError if seeds are not whole numbers in 0..2^32 - 1.
    """
    try:
        seeds = [seed if isinstance(seed, torch.Generator) else index(seed) for seed in seeds]
    except TypeError:
        raise ValueError(f"seeds must be a list of whole numbers, such as [0, 1], got {seeds!r}") from None
    for seed in seeds:
        if not isinstance(seed, torch.Generator) and not 0 <= seed < 2**32:
            raise ValueError(f"a seed must lie in 0..2^32 - 1, got {seed}; no number stands for a random one")
    generators = [s if isinstance(s, torch.Generator) else torch.Generator().manual_seed(s) for s in seeds]
    return other_stream(generators, stream) if stream else generators


def other_stream(generators: Sequence[torch.Generator], stream: int) -> list[torch.Generator]:
    """The same seeds' generators in another stream, at its beginning. stream: counted from the stream they are in."""
    step = 0x9E3779B1  # the golden ratio of 2^32: its first multiples lie far apart
    return [torch.Generator().manual_seed((g.initial_seed() + stream * step) % 2**32) for g in generators]
