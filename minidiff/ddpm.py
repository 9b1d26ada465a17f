"""The mathematics of DDPM: noise an image forward, estimate it back, take one reverse step, and the losses.

Read `schedule.py` first. Every function is pure and works on float tensors of any shape (B, C, H, W); alpha-bars come
in as (B, 1, 1, 1) float64 on the CPU, and are cast and moved only after the coefficient is formed.

    forward   x_t = sqrt(alpha_bar_t) x_start + sqrt(1 - alpha_bar_t) noise                          add_noise
              the same from x_t to a later time                                                      add_more_noise
    estimate  x_start from x_t and the network's eps                                                 predict_x_start
    reverse   x_prev ~ N(posterior_mean(x_start, x_t), variance between beta_tilde and beta)         step
    train     |noise - eps|^2, and a bound that trains only the variance                             loss

A strided sampler jumps from t to any earlier time `prev`. All formulas then hold with
alpha_t = alpha_bar_t / alpha_bar_prev and beta_t = 1 - alpha_t, so the formulas of a reverse step take both alpha-bars.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minidiff.checks import same_shape
from minidiff.schedule import Schedule

FixXStart = Callable[[Tensor], Tensor]  # clips or thresholds an estimate of the clean image
Previous = tuple[Tensor, Tensor]  # the time before this one, (B,), and its estimate


def add_noise(x_start: Tensor, noise: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """The forward process in one jump: an image with the share alpha_bar_t of its variance left.

        x_t = sqrt(alpha_bar_t) * x_start + sqrt(1 - alpha_bar_t) * noise

    x_start, noise: (B, C, H, W), noise ~ N(0, I).  alpha_bar_t: (B, 1, 1, 1) in [0, 1].
    Raises ValueError if the shapes differ.    Source: DDPM Eq. 4.
    """
    same_shape(x_start=x_start, noise=noise)
    return cast(alpha_bar_t.sqrt(), x_start) * x_start + cast((1 - alpha_bar_t).sqrt(), x_start) * noise


def add_more_noise(schedule: Schedule, x_t: Tensor, t: Tensor, t_later: Tensor, noise: Tensor) -> Tensor:
    """The forward process from one time to a later one; nobody needs to know the clean image.

        x_later = sqrt(alpha) * x_t + sqrt(1 - alpha) * noise,    alpha = alpha_bar_later / alpha_bar_t

    With t_later = t + 1, alpha is 1 - beta_later and the formula is the paper's; several steps at once have its form.
    x_t, noise: (B, C, H, W), noise ~ N(0, I).  t, t_later: (B,) int64, t_later > t >= -1.    Source: DDPM Eq. 2.
    """
    return add_noise(x_t, noise, schedule.alpha_bar(t_later) / schedule.alpha_bar(t))


def predict_x_start(x_t: Tensor, eps: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """Undo the forward process: the clean image that this noisy one comes from if eps is its noise.

        x_start = (x_t - sqrt(1 - alpha_bar_t) * eps) / sqrt(alpha_bar_t)

    x_t, eps: (B, C, H, W).  alpha_bar_t: (B, 1, 1, 1) in (0, 1].
    Not clipped; near alpha_bar_t = 0 errors in eps grow by 1 / sqrt(alpha_bar_t), which is 20291 at IF's t = 999.
    Raises ValueError if the shapes differ.    Source: DDPM Eq. 15.
    """
    same_shape(x_t=x_t, eps=eps)
    return (x_t - cast((1 - alpha_bar_t).sqrt(), x_t) * eps) / cast(alpha_bar_t.sqrt(), x_t)


def posterior_mean(x_start: Tensor, x_t: Tensor, alpha_bar_t: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """The mean of x_prev if x_start were known, besides x_t.

        q(x_prev | x_t, x_start) = N(mean, beta_tilde_t)                DDPM Eq. 6
        mean = sqrt(alpha_bar_prev) beta_t / (1 - alpha_bar_t) x_start
             + sqrt(alpha_t) (1 - alpha_bar_prev) / (1 - alpha_bar_t) x_t

    with alpha_t = alpha_bar_t / alpha_bar_prev, beta_t = 1 - alpha_t; beta_tilde_t is `posterior_variance`.
    x_start, x_t: (B, C, H, W).  alpha_bar_t, alpha_bar_prev: (B, 1, 1, 1), alpha_bar_t < alpha_bar_prev <= 1.
    Source: DDPM Eq. 7.
    """
    same_shape(x_start=x_start, x_t=x_t)
    alpha_t = alpha_bar_t / alpha_bar_prev
    to_start = alpha_bar_prev.sqrt() * (1 - alpha_t) / (1 - alpha_bar_t)
    to_noisy = alpha_t.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar_t)
    return cast(to_start, x_t) * x_start + cast(to_noisy, x_t) * x_t


def posterior_variance(alpha_bar_t: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """The variance of q(x_prev | x_t, x_start), beta-tilde: the smallest a reverse step may have.

        beta_tilde_t = (1 - alpha_bar_prev) / (1 - alpha_bar_t) * beta_t

    alpha-bars and result: (B, 1, 1, 1) float64; 0 when alpha_bar_prev is 1.    Source: DDPM Eq. 7.
    """
    return (1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev)


def learned_log_var(pred_var: Tensor, alpha_bar_t: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """The log variance that the network answers, as a place between the logs of its two bounds.

        log_var = f log(beta_t) + (1 - f) log(beta_tilde_t),    f = (pred_var + 1) / 2

    pred_var: (B, C, H, W), -1 for the lower bound and 1 for the upper; not clamped, as in IF.
    beta_tilde is 0 for the step to the clean image and is floored at 1e-20, as in diffusers. iDDPM's code takes the
    beta_tilde of t = 1 there. No sample shows it, for this step draws no noise; `bound` at t = 0 does.
    Source: iDDPM Eq. 15.
    """
    beta_t = 1 - alpha_bar_t / alpha_bar_prev
    lower = posterior_variance(alpha_bar_t, alpha_bar_prev).clamp(min=1e-20)
    f = (pred_var + 1) / 2
    return f * cast(beta_t.log(), pred_var) + (1 - f) * cast(lower.log(), pred_var)


def step(
    schedule: Schedule, x_t: Tensor, t: Tensor, t_prev: Tensor, eps: Tensor, pred_var: Tensor | None, noise: Tensor,
    fix_x_start: FixXStart | None = None, previous: Previous | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One reverse step, from time t to the earlier time t_prev (-1: clean).

        x_prev = posterior_mean(pred_x_start, x_t) + sqrt(variance) * noise               DDPM Alg. 2
        posterior_mean = (x_t - beta_t / sqrt(1 - alpha_bar_t) * eps) / sqrt(alpha_t)     DDPM Eq. 11
        beta_t = 1 - alpha_t,    alpha_t = alpha_bar_t / alpha_bar_prev                   iDDPM Sec. 4

    The step to -1 adds no noise.  fix_x_start: clips or thresholds the estimate before use; DDPM Eq. 11 then fails.
    x_t, eps, noise: (B, C, H, W).  t, t_prev: (B,) int64, any number of times apart.
    pred_var: (B, C, H, W) for a learned variance (iDDPM Eq. 15), or None for the larger bound beta_t (DDPM Sec. 3.2's
    first choice).  previous: only `solvers.dpm_step` uses it.  Returns (x_prev, pred_x_start).
    Raises ValueError if t_prev is no earlier time, or the shapes differ.
    """
    pred_var = torch.ones_like(x_t) if pred_var is None else pred_var
    same_shape(x_t=x_t, eps=eps, noise=noise, pred_var=pred_var)
    alpha_bar_t, alpha_bar_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
    if not (alpha_bar_t < alpha_bar_prev).all():
        raise ValueError(f"a reverse step leads to an earlier time, got t {t.tolist()} and t_prev {t_prev.tolist()}")
    pred_x_start = predict_x_start(x_t, eps, alpha_bar_t)
    if fix_x_start is not None:
        pred_x_start = fix_x_start(pred_x_start)
    mean = posterior_mean(pred_x_start, x_t, alpha_bar_t, alpha_bar_prev)
    log_var = learned_log_var(pred_var, alpha_bar_t, alpha_bar_prev)
    still_noisy = cast((t_prev >= 0).view(-1, 1, 1, 1).to(x_t.device), x_t)
    x_prev = mean + still_noisy * (0.5 * log_var).exp() * noise
    return x_prev, pred_x_start


def loss(
    schedule: Schedule, x_start: Tensor, noise: Tensor, t: Tensor, eps: Tensor, pred_var: Tensor | None,
    weight: Tensor | float = 1.0, bound_weight: Tensor | float = 1.0,
) -> Tensor:  # fmt: skip
    """What training minimises, one number per image: (B,).

        L_simple = mean |noise - eps|^2                                               DDPM Eq. 14
        L_hybrid = weight * L_simple + bound_weight * 0.001 * T * bound               iDDPM Eq. 16

    weight, bound_weight: 1, or (B,), how much each image's time counts.  Without pred_var, L_simple is all. With it,
    one term of the variational bound (`bound`) trains the variance and is kept from touching eps; T times a term at a
    random time estimates the sum over all times, and 0.001 is its weight.
    Raises ValueError if the shapes differ.
    """
    same_shape(x_start=x_start, noise=noise, eps=eps)
    simple = weight * (noise - eps).square().flatten(1).mean(1)
    if pred_var is None:
        return simple
    of_variance = bound(schedule, x_start, noise, t, eps.detach(), pred_var)
    return simple + bound_weight * of_variance * schedule.num_train_timesteps * 1e-3


def bound(schedule: Schedule, x_start: Tensor, noise: Tensor, t: Tensor, eps: Tensor, pred_var: Tensor) -> Tensor:
    """One term of the variational bound, in bits per value: how far our reverse step is from the true posterior.

        t > 0:  KL( N(true_mean, beta_tilde_t) || N(mean, exp(log_var)) )         DDPM Eq. 5, iDDPM Eq. 6
        t = 0:  -log P( N(mean, exp(log_var)) gives x_start's own 8-bit value )   iDDPM Eq. 5

    true_mean is `posterior_mean` of x_start, mean that of the estimate.
    x_start: (B, C, H, W) in [-1, 1] on the grid of 256 levels.  Returns (B,).
    """
    alpha_bar_t, alpha_bar_prev = (schedule.alpha_bar(s) for s in (t, t - 1))
    x_t = add_noise(x_start, noise, alpha_bar_t)
    true_mean = posterior_mean(x_start, x_t, alpha_bar_t, alpha_bar_prev)
    true_log_var = cast(posterior_variance(alpha_bar_t, alpha_bar_prev).clamp(min=1e-20).log(), x_start)
    mean = posterior_mean(predict_x_start(x_t, eps, alpha_bar_t), x_t, alpha_bar_t, alpha_bar_prev)
    log_var = learned_log_var(pred_var, alpha_bar_t, alpha_bar_prev)
    is_last = (t == 0).view(-1, 1, 1, 1).to(x_start.device)
    # Each formula gets only its own times: where the other one overflows, 0 * inf would make the gradient NaN.
    kl_log_var = torch.where(is_last, true_log_var, log_var)
    distance = (true_mean - mean).square() * (-kl_log_var).exp()
    kl = 0.5 * (kl_log_var - true_log_var - 1 + (true_log_var - kl_log_var).exp() + torch.where(is_last, 0, distance))
    nll = -_log_prob_of_8bit(x_start, mean, torch.where(is_last, log_var, 0).clamp(min=-60))  # std 1e-13 at least
    return torch.where(is_last, nll, kl).flatten(1).mean(1) / math.log(2)


def _log_prob_of_8bit(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """The log of the probability that a Gaussian falls into x's own bin; the outermost bins reach to infinity.

        P(x) = Phi((x + 1/255 - mean) / std) - Phi((x - 1/255 - mean) / std)

    Differences are taken in the lower tail, and of narrow bins by the density, where float32 keeps its digits.
    Source: DDPM Eq. 13.
    """
    inv_std = (-0.5 * log_var).exp()
    centre, half = (x - mean) * inv_std, inv_std / 255
    z, ndtr = -centre.abs(), torch.special.ndtr
    density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
    inside = torch.where(half < 3e-3, 2 * half * density, ndtr(z + half) - ndtr(z - half))
    prob = torch.where(x > 0.999, ndtr(half - centre), torch.where(x < -0.999, ndtr(centre + half), inside))
    return prob.clamp(min=1e-12).log()


def cast(coefficient: Tensor, like: Tensor) -> Tensor:
    """To the type first and the device second: tables are float64 on the CPU, which Apple's GPUs do not have.

    Raises ValueError unless coefficient is (B, 1, 1, 1), or (1, 1, 1, 1) for all images alike, and no NaN, as roots of
    an alpha-bar above 1 are; and unless `like` is of floats.
    (A coefficient (B,) would multiply the columns of images that are B pixels wide.)
    """
    if coefficient.shape[1:] != (1, 1, 1) or len(coefficient) not in (1, len(like)):
        raise ValueError(f"alpha-bars and times must be (B, 1, 1, 1) for images {tuple(like.shape)}, got "
                         f"{tuple(coefficient.shape)}; Schedule.alpha_bar(t) has this shape")  # fmt: skip
    if not coefficient.is_cuda and coefficient.isnan().any():  # asking a GPU would make it wait
        raise ValueError("alpha-bars and times lie in [0, 1], and noise grows with t; Schedule.alpha_bar(t) gives them")
    if not like.is_floating_point():
        raise ValueError(f"images are floats in [-1, 1], got {like.dtype}; of bytes pass x / 127.5 - 1")
    return coefficient.to(like.dtype).to(like.device)
