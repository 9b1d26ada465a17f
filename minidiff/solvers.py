"""Fewer steps: DDIM and DPM-Solver++ as other ways to take one reverse step.

Read `ddpm.py` first. `ddpm.step` draws noise anew in every step. The same network also defines an ordinary
differential equation, which has no noise in it and, with an exact network, bears longer steps:

    ddim_step   first order: eps stays as it is during the step               error falls as 1 / steps
    dpm_step    second order: x_start moves on in a straight line over lambda error falls as 1 / steps^2

The orders hold once steps are short. In lambda the step into t = 0 is a long one, and there `dpm_step` goes too far.
For a count of steps `times_for` leaves that time out, as diffusers' own list does.

All three are called alike, step(schedule, x_t, t, t_prev, eps, pred_var, noise, fix_x_start, previous), and
`sampling.denoise` takes any of them. The two of this file do not use pred_var.
`invert` walks the same equation upwards: from an image to the noise that gives it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minidiff import ddpm
from minidiff.checks import same_shape
from minidiff.ddpm import FixXStart, Previous, cast
from minidiff.schedule import Schedule, check_timesteps, respaced, strided


def ddim_step(
    schedule: Schedule, x_t: Tensor, t: Tensor, t_prev: Tensor, eps: Tensor, pred_var: Tensor | None, noise: Tensor,
    fix_x_start: FixXStart | None = None, previous: Previous | None = None, eta: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step along the line between the estimate and the noise: from time t to the earlier t_prev (-1: clean).

        x_prev = sqrt(alpha_bar_prev) x_start + sqrt(1 - alpha_bar_prev - sigma^2) eps + sigma noise        DDIM Eq. 12
        sigma = eta sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t)) sqrt(1 - alpha_bar_t / alpha_bar_prev)   DDIM Eq. 16

    Where fix_x_start changes the estimate, eps stays the network's, as in diffusers.
    eta: 0 adds no noise; 1 adds as much as DDPM with its smaller variance.  Other arguments: as for `ddpm.step`.
    Returns (x_prev, x_start), each (B, C, H, W).
    """
    alpha_bar_t, alpha_bar_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
    same_shape(x_t=x_t, noise=noise)
    x_start = ddpm.predict_x_start(x_t, eps, alpha_bar_t)
    if fix_x_start is not None:
        x_start = fix_x_start(x_start)
    variance = torch.zeros_like(alpha_bar_t)
    if eta:  # of a clean x_t it would be 0 / 0
        variance = eta**2 * ddpm.posterior_variance(alpha_bar_t, alpha_bar_prev)
    to_noise = (1 - alpha_bar_prev - variance).clamp(min=0).sqrt()
    x_prev = cast(alpha_bar_prev.sqrt(), x_t) * x_start + cast(to_noise, x_t) * eps
    return x_prev + cast(variance.sqrt(), x_t) * noise, x_start


def dpm_step(
    schedule: Schedule, x_t: Tensor, t: Tensor, t_prev: Tensor, eps: Tensor, pred_var: Tensor | None, noise: Tensor,
    fix_x_start: FixXStart | None = None, previous: Previous | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step of DPM-Solver++(2M), which also remembers the estimate before this one.

        x_prev = sigma_prev / sigma_t x_t + (a_prev - sigma_prev a_t / sigma_t) D
        D = x_start + (x_start - x_start before) / (2 r)
        r = (lambda_t - lambda_before) / (lambda_prev - lambda_t)

    with a = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar), lambda = log(a / sigma). The paper writes the bracket as
    a_prev (1 - exp(-h)) with h = lambda_prev - lambda_t, and a_prev exp(-h) is sigma_prev a_t / sigma_t.
    Two steps take D = x_start: the first, which has no previous one, and the step to clean, whose lambda is infinite.
    They are DDIM's, except that where fix_x_start changes the estimate, DDIM keeps the old eps.
    The paper ends at a time with noise left; the step to clean is that of diffusers (final_sigmas_type "zero").
    previous: (time before, x_start before).  Other arguments and result: as for `ddim_step`.
    Source: DPM-Solver++ Alg. 2 (arXiv 2211.01095v2), data prediction; as diffusers' DPMSolverMultistepScheduler.
    """
    alpha_bar_t, alpha_bar_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
    x_start = ddpm.predict_x_start(x_t, eps, alpha_bar_t)
    if fix_x_start is not None:
        x_start = fix_x_start(x_start)
    direction = x_start
    if previous is not None and int(t_prev.min()) >= 0:
        before, x_start_before = previous
        lambda_t, lambda_prev = _half_log_snr(alpha_bar_t), _half_log_snr(alpha_bar_prev)
        lambda_before = _half_log_snr(schedule.alpha_bar(before))
        r = (lambda_t - lambda_before) / (lambda_prev - lambda_t)
        direction = x_start + cast(0.5 / r, x_t) * (x_start - x_start_before)
    ratio = ((1 - alpha_bar_prev) / (1 - alpha_bar_t)).sqrt()
    to_start = alpha_bar_prev.sqrt() - ratio * alpha_bar_t.sqrt()
    return cast(ratio, x_t) * x_t + cast(to_start, x_t) * direction, x_start


STEPS = {"ddpm": ddpm.step, "ddim": ddim_step, "dpm++": dpm_step}  # what --sampler names
LEFT = 1e-6  # the least alpha-bar from which `invert` leads back: IF's is 2.4e-9 at t = 999 and 2.4e-6 at t = 998
COURSE = "course"  # the walk of the course: it ends at t = 0, slightly noisy, and does not threshold


def times_for(sampler: str, steps: int | str | Tensor, num_train_timesteps: int = 1000) -> Tensor:
    """The times a sampler visits, (S,) int64, descending.

    steps: a count, a name like smart27, or sections like "10,10,3,2,2" (`schedule.respaced`); of 1,000 times also
    "course", 990, 960, ..., 0; or the times themselves as a tensor. For dpm++ a count N means the times of N + 1 steps
    without the last one, t = 0.    Raises ValueError as `respaced` and `check_timesteps`.
    """
    if isinstance(steps, Tensor):
        check_timesteps(steps, num_train_timesteps)
        return steps
    if str(steps) == COURSE and num_train_timesteps == 1000:
        return strided()
    if sampler == "dpm++" and str(steps).isdecimal() and 0 < int(steps) < num_train_timesteps:
        return respaced(int(steps) + 1, num_train_timesteps)[:-1]
    return respaced(steps, num_train_timesteps)


@torch.inference_mode()
def invert(predict: Callable[..., tuple[Tensor, Tensor | None]], x_start: Tensor, timesteps: Tensor,
           schedule: Schedule) -> Tensor:  # fmt: skip
    """Walk DDIM's equation upwards: from an image to the noise from which `ddim_step` leads back to it.

        x_later = sqrt(alpha_bar_later) x_start + sqrt(1 - alpha_bar_later) eps,    eps = predict(x_t, t_later)
        x_start = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)

    Each step asks the network for eps at the time it goes to, with the x of the time it leaves. This answer is wrong by
    less with more steps.
    x_start: (B, C, H, W) in [-1, 1].  timesteps: (S,) int64, descending, as for `sampling.denoise`, such as
    schedule.leading(30). They must not begin where nothing of the image is left, as those of `times_for` do.
    Raises ValueError if they do, or do not descend.
    Returns x at timesteps[0], (B, C, H, W).    Source: DDIM Sec. 4.3; as diffusers' DDIMInverseScheduler.
    """
    check_timesteps(timesteps, schedule.num_train_timesteps)
    if schedule.alpha_bar(timesteps[:1]) < LEFT:
        raise ValueError(f"at t = {int(timesteps[0])} nothing is left of an image that could be led back; pass "
                         "earlier times, such as schedule.leading(30)")  # fmt: skip
    x_t, t = x_start.float(), torch.full((len(x_start),), -1, device=x_start.device)
    for later in timesteps.flip(0).tolist():
        t_later = torch.full_like(t, later)
        eps = predict(x_t, t_later)[0].float()
        x_t, _ = ddim_step(schedule, x_t, t, t_later, eps, None, torch.zeros_like(x_t))  # eta 0 leads either way
        t = t_later
    return x_t


def _half_log_snr(alpha_bar: Tensor) -> Tensor:
    return 0.5 * (alpha_bar.log() - (1 - alpha_bar).log())
