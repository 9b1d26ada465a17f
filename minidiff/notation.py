"""Converters between the notations of several papers: how noisy an image is, and what a network answers.

Read `ddpm.py` and `flow.py` first. Every paper mixes a clean image with noise. The mixtures differ in scale:

    x_t = sqrt(alpha_bar) x_start + sqrt(1 - alpha_bar) eps       DDPM, "variance preserving", used in this package
    x   = x_start + sigma eps                                     EDM and k-diffusion, "variance exploding"
    x   = time x_start + (1 - time) eps                           flow matching

Each paper has a letter for how noisy the image is. Functions lead from alpha-bar to every letter and back. A network
may answer eps, x_start, v, the score or the velocity. Where x_t is known, one answer gives all the others: `from_...`
makes (eps, x_start) of an answer (for eps, `ddpm.predict_x_start` does), `..._of` makes an answer of eps and x_start.

alpha_bar: (B, 1, 1, 1) float64 in (0, 1), as `Schedule.alpha_bar` gives it.  x_t and answers: (B, C, H, W).
All raise ValueError if the shapes of x_t and answers differ.
"""

import torch
from torch import Tensor

from minidiff import ddpm
from minidiff.checks import same_shape
from minidiff.ddpm import cast


def sigma_of(alpha_bar: Tensor) -> Tensor:
    """EDM's letter, the deviation of the noise on an unscaled image, from 0 (clean) to infinity.

        sigma = sqrt((1 - alpha_bar) / alpha_bar)
    """
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def alpha_bar_of_sigma(sigma: Tensor) -> Tensor:
    """The inverse of `sigma_of`: 1 / (1 + sigma^2)."""
    return 1 / (1 + sigma.square())


def time_of(alpha_bar: Tensor) -> Tensor:
    """Flow matching's letter, the share of the image in the mixture, from 0 (noise) to 1 (clean), as in `flow.clock`.

        time = sqrt(alpha_bar) / (sqrt(alpha_bar) + sqrt(1 - alpha_bar)) = 1 / (1 + sigma)
    """
    return alpha_bar.sqrt() / (alpha_bar.sqrt() + (1 - alpha_bar).sqrt())


def alpha_bar_of_time(time: Tensor) -> Tensor:
    """The inverse of `time_of`: time^2 / (time^2 + (1 - time)^2)."""
    return time.square() / (time.square() + (1 - time).square())


def lambda_of(alpha_bar: Tensor) -> Tensor:
    """DPM-Solver++'s letter, half the log of signal / noise, from minus infinity (noise) to infinity (clean).

        lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)) = -log sigma
    """
    return torch.logit(alpha_bar) / 2


def alpha_bar_of_lambda(half_log_snr: Tensor) -> Tensor:
    """The inverse of `lambda_of`: 1 / (1 + exp(-2 lambda))."""
    return torch.sigmoid(2 * half_log_snr)


def to_edm(x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t on EDM's scale: x_t / sqrt(alpha_bar) = x_start + sigma eps."""
    return x_t / cast(alpha_bar.sqrt(), x_t)


def to_flow(x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """x_t on the scale of `flow.path`, time x_start + (1 - time) eps: x_t / (sqrt(alpha_bar) + sqrt(1 - alpha_bar))."""
    return x_t / cast(alpha_bar.sqrt() + (1 - alpha_bar).sqrt(), x_t)


def from_x_start(x_t: Tensor, x_start: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """(eps, x_start) of a network that answers x_start: eps = (x_t - sqrt(alpha_bar) x_start) / sqrt(1 - alpha_bar)."""
    same_shape(x_t=x_t, x_start=x_start)
    return (x_t - cast(alpha_bar.sqrt(), x_t) * x_start) / cast((1 - alpha_bar).sqrt(), x_t), x_start


def from_v(x_t: Tensor, v: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """(eps, x_start) of a network that answers v. Nothing is divided, so errors grow at neither end.

        eps = sqrt(1 - alpha_bar) x_t + sqrt(alpha_bar) v
        x_start = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v
    """
    same_shape(x_t=x_t, v=v)
    signal, noise = cast(alpha_bar.sqrt(), x_t), cast((1 - alpha_bar).sqrt(), x_t)
    return noise * x_t + signal * v, signal * x_t - noise * v


def from_score(x_t: Tensor, score: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """(eps, x_start) of a network that answers the score: eps = -sqrt(1 - alpha_bar) score."""
    same_shape(x_t=x_t, score=score)
    eps = -cast((1 - alpha_bar).sqrt(), x_t) * score
    return eps, ddpm.predict_x_start(x_t, eps, alpha_bar)


def from_velocity(x_t: Tensor, velocity: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """(eps, x_start) of a network that answers the velocity at x = to_flow(x_t, alpha_bar).

        eps = x - time velocity
        x_start = x + (1 - time) velocity
    """
    same_shape(x_t=x_t, velocity=velocity)
    x, time = to_flow(x_t, alpha_bar), cast(time_of(alpha_bar), x_t)
    return x - time * velocity, x + (1 - time) * velocity


def v_of(eps: Tensor, x_start: Tensor, alpha_bar: Tensor) -> Tensor:
    """The derivative of x_t with respect to the angle phi, if sqrt(alpha_bar) = cos phi.

        v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_start

    Source: Progressive Distillation Sec. 4.
    """
    same_shape(eps=eps, x_start=x_start)
    return cast(alpha_bar.sqrt(), eps) * eps - cast((1 - alpha_bar).sqrt(), eps) * x_start


def score_of(eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """The gradient of log p(x_t) with respect to x_t: -eps / sqrt(1 - alpha_bar), if eps is the mean of x_t's noise.

    Source: Song et al., arXiv 2011.13456.
    """
    return -eps / cast((1 - alpha_bar).sqrt(), eps)


def velocity_of(eps: Tensor, x_start: Tensor) -> Tensor:
    """The direction from noise to data, x_1 - x_0 in flow matching's letters: x_start - eps."""
    same_shape(eps=eps, x_start=x_start)
    return x_start - eps
