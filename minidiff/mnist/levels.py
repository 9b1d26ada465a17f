"""Reference levels: the losses of three simple answers, to read a loss curve by.

A loss of 0.03 says nothing alone. Three levels, all computed from the training digits, say what it is worth:

    mean image          the best answer to pure noise
    linear optimum      the best answer that is linear in the input, exact if digits were Gaussian: a network that
                        learns shapes must fall well below it
    training set known  the best answer if x_start is one of the training digits, all equally likely (and of the class,
                        if the network takes it): the loss on these digits cannot fall below it

All are about x_t = a x_start + b noise. The denoiser has a = 1, b = sigma; DDPM a = sqrt(alpha_bar_t),
b = sqrt(1 - alpha_bar_t); flow matching a = t, b = 1 - t. An error e in x_start is an error a e / b in eps and e / b in
the velocity, so one formula with a weight serves all three.

Read `mnist/unet.py` first.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minidiff.mnist.data import Digits, generator
from minidiff.schedule import Schedule

Task = Callable[[int], tuple[Tensor, Tensor, Tensor]]  # n -> a, b, weight, each (n,): a loss at n evenly spread times
SAMPLES = 3000  # times, and digits, of a level


def denoiser(sigma: float) -> Task:
    """L = mean |x - x_start|^2 at one strength of noise."""
    return lambda n: (torch.ones(n), torch.full((n,), sigma), torch.ones(n))


def ddpm(schedule: Schedule) -> Task:
    """DDPM's loss, the error in eps."""

    def at_times(n: int) -> tuple[Tensor, Tensor, Tensor]:
        alpha_bar = schedule.alphas_cumprod[torch.arange(n) * schedule.num_train_timesteps // n]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), alpha_bar / (1 - alpha_bar)

    return at_times


def flow(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Flow matching's loss, the error in the velocity, at the middles of n equal sections of time: a Task."""
    t = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return t, 1 - t, (1 - t) ** -2


def of_task(task: Task, digits: Digits, dropout: float = 1.0) -> dict[str, float]:
    """The linear optimum and that of the known training set.  dropout: how often the class is withheld."""
    a, b, weight = task(SAMPLES)
    linear = (weight * linear_mse(spectrum(digits.images), a, b)).mean().item()
    known = known_mse(digits, *task(min(SAMPLES, len(digits))), dropout)
    return {"linear optimum (training digits)": linear, "training set known": known}


def mean_image_mse(images: Tensor) -> float:
    """Mean over images and pixels of |x - mean image|^2. images: (N, 1, 28, 28)."""
    return images.cpu().flatten(1).double().var(0, unbiased=False).mean().item()


def spectrum(images: Tensor) -> Tensor:
    """Variances of the images along their principal directions, the covariance's eigenvalues: (784,) float64."""
    return torch.linalg.eigvalsh(images.cpu().flatten(1).double().T.cov(correction=0)).clamp(min=0)


def linear_mse(variances: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """The least mean square error, per pixel, of an x_start that is linear in a x_start + b noise.

        mean over directions of v b^2 / (a^2 v + b^2)

    variances: (N,), of `spectrum`.  a, b: numbers or (K,).  Returns () or (K,).
    """
    a, b = (torch.as_tensor(k, dtype=torch.float64)[..., None] for k in (a, b))
    total = (a**2 * variances + b**2).clamp(min=1e-300)  # 0 / 0 is an unvarying pixel, and no error
    return (variances * b**2 / total).mean(-1)


def posterior_mean(x_t: Tensor, a: Tensor, b: Tensor, known: Digits, labels: Tensor | None = None) -> Tensor:
    """E[x_start | x_t] if x_start is one of the known digits, all equally likely.

        sum_i softmax_i( -|x_t - a x_i|^2 / (2 b^2) ) x_i

    The answer of `toy.Mixture` with std 0, by matrix products: that one would need 94 GB for 500 digits.
    x_t: (B, 1, 28, 28).  a, b: (B,).  labels: (B,), classes; then the sum is over the x_i of that class.
    """
    a, b = a.view(-1, 1).to(x_t), b.view(-1, 1).to(x_t)
    x, flat = known.images.flatten(1), x_t.flatten(1)
    logits = a * (flat @ x.T - a / 2 * x.square().sum(1)) / b**2  # without |x_t|^2, which all share
    if labels is not None:
        logits = logits.masked_fill(labels[:, None] != known.labels, -torch.inf)
    return (logits.softmax(1) @ x).view_as(x_t)


def known_mse(digits: Digits, a: Tensor, b: Tensor, weight: Tensor, dropout: float = 1.0) -> float:
    """The mean of weight * |x - posterior mean|^2 over the first K digits x, one for each entry of a, b, weight: (K,).

    dropout: how often the class is withheld; 1: always.
    """
    some, device = digits[: len(a)], digits.images.device
    noise = torch.randn(some.images.shape, generator=generator(device, 0), device=device).to(some.images)
    tables, total = [v.to(noise) for v in (a, b, weight)], 0.0
    for x, labels, z, a, b, w in zip(*(v.split(500) for v in (some.images, some.labels, noise, *tables))):
        x_t = a.view(-1, 1, 1, 1) * x + b.view(-1, 1, 1, 1) * z
        for classes, share in ((None, dropout), (labels, 1 - dropout)):
            if share:
                error = (posterior_mean(x_t, a, b, digits, classes) - x).square().flatten(1).mean(1)
                total += share * (w * error).sum().item()
    return total / len(some)
